"""Takedown: delete an image and everything derived from it, and write a report.

    shards                  its samples are removed from the tars, and it is blocked from now on
    table                   its rows are removed from all versions, with embeddings and features; all pins are dropped
    training sets           its latents for every base model; entire tables of references that contain it
    evaluations             images generated with it as a reference; metrics' features of these images and of itself;
                            pages that show it, also MLflow's copies
    models                  versions, and copies under the home, with an index that contains it

Images that the teacher generated from prompts alone are kept, and so are trained weights: the report lists the
trainings that used the image, and what only a person can delete. The report is stored next to the shards. All steps are
idempotent: after a kill, call it again with the same values.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem

from imagerag.artifacts import Sweep
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.ledger import having, iter_attempts
from imagerag.corpus.takedown import remove_images
from imagerag.errors import UserError
from imagerag.retrieval.blocklist import Column, blocked, matches
from imagerag.retrieval.pins import JOB, TRAINING, pins
from imagerag.retrieval.schema import row_ids
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import Removal, holds, reachable_rows, remove_rows
from imagerag.settings import Settings
from imagerag.storage.files import read_json
from imagerag.storage.hexadecimal import ID, SHA256, from_hex, to_hex
from imagerag.storage.keyed_table import KeyedTable
from imagerag.storage.lance_table import table_at
from imagerag.storage.locks import writer_lock
from imagerag.takedown_report import make_report, write_report

REPORTS = "takedowns"
"""Folder of the reports, inside the corpus's shards folder."""
_PULLED = "model_index.json"
"""File by which the folder of a pulled model is recognised."""
_BATCH_ROWS = 65_536
_KNOWN = pa.schema([("id", ID), ("url", pa.string()), ("image_sha256", SHA256)])


@dataclass(frozen=True, kw_only=True)
class Target:
    """Images to take down, with every row id, URL and hash under which they are known.

    Ids and hashes are in hexadecimal digits.
    """

    ids: tuple[str, ...]
    urls: tuple[str, ...]
    image_sha256s: tuple[str, ...]
    asked: Mapping[Column, Sequence[str]]
    """Values that the user named, by column."""


@dataclass(frozen=True, kw_only=True)
class Takedown:
    """Result of a takedown."""

    uri: str
    """URI of the report."""
    num_samples: int
    """Images that were removed from the shards."""
    removal: Removal | None
    """Rows removed from the table, if there is one."""
    sweep: Sweep


def find(
    settings: Settings, name: str, *, urls: Sequence[str] = (), ids: Sequence[str] = (), sha256s: Sequence[str] = ()
) -> Target:
    """Return the images with these URLs, row ids or hashes, including their other URLs and captions.

    Raises:
        UserError: if no value is given, the corpus never had one of them, or it is no id or hash.
    """
    store, corpus = Store(settings.index_uri, name), Corpus(settings.shards_of(name))
    ids, sha256s = ([digits.lower() for digits in values] for values in (ids, sha256s))
    wanted: dict[Column, Sequence[str]] = {"id": ids, "url": urls, "image_sha256": sha256s}
    if not any(wanted.values()):
        raise UserError("name at least one URL, id or image hash to take down")
    known = _known(store, corpus, wanted)
    hashes = set(sha256s)
    for column, values in wanted.items():
        # The rows of a blocked value may be gone already, removed by a takedown that was killed later.
        missing = set(values) - _texts(known[column]) - set(blocked(store, column) if store.exists else ())
        if missing:
            raise UserError(f"{name!r} never had an image of the {column} {min(missing)!r}; nothing was taken down")
    hashes |= _texts(known["image_sha256"])
    own = _known(store, corpus, {"image_sha256": hashes})
    return Target(
        ids=tuple(sorted({*ids, *_texts(own["id"])})),
        urls=tuple(sorted({*urls, *_texts(own["url"])})),
        image_sha256s=tuple(sorted(hashes)),
        asked=wanted,
    )


def _known(store: Store, corpus: Corpus, wanted: Mapping[Column, Collection[str]]) -> pa.Table:
    """Return what was ever fetched, and rows of the table, that have one of some values in one of some columns."""
    found = [_KNOWN.empty_table()]
    where = None  # ids have to be computed of all rows
    if not wanted.get("id"):
        where = having(urls=wanted.get("url", ()), sha256s=wanted["image_sha256"])
    attempts = iter_attempts(corpus, where)
    for batch in chain.from_iterable(rows.to_batches(max_chunksize=_BATCH_ROWS) for rows in attempts):
        batch = batch.filter(pc.is_valid(batch["sha256"]))
        ids = row_ids(batch["sha256"], batch["caption"])
        rows = pa.table([ids, batch["url"], from_hex(batch["sha256"].to_pylist(), SHA256)], schema=_KNOWN)
        found += [rows.filter(matches(rows, column, list(values))) for column, values in wanted.items()]
    if store.exists:
        found.append(reachable_rows(store, wanted).select(_KNOWN.names).cast(_KNOWN))
    return pa.concat_tables(found)


def _texts(column: pa.ChunkedArray) -> set[str]:
    return set(column.to_pylist() if pa.types.is_string(column.type) else to_hex(column))


def take_down(settings: Settings, name: str, target: Target) -> Takedown:
    """Delete the images that `find` returned from everywhere, and write a report.

    The images and the named URLs are blocked from now on. Takedowns from the same corpus run one at a time.

    Raises:
        UserError: if MLflow can't be reached. No report is written then; call it again to continue.
    """
    corpus = Corpus(settings.shards_of(name))
    with writer_lock(corpus.uri, "takedown"):
        return _take_down(settings, name, corpus, target)


def _take_down(settings: Settings, name: str, corpus: Corpus, target: Target) -> Takedown:
    now = datetime.now(UTC)
    store, ids = Store(settings.index_uri, name), from_hex(target.ids, ID)
    reading = [label for label in (pins(store) if store.exists else ()) if label.startswith((JOB, TRAINING))]
    # Shards come first: an ingest between the two steps must not restore the rows.
    num_samples = remove_images(corpus, urls=target.asked["url"], sha256s=target.image_sha256s)
    removal = None
    if store.exists:
        # A deleted row that is still in a file may have one of these URLs and another image: only the URL finds it.
        urls, sha256s = target.asked["url"], target.image_sha256s
        removal = remove_rows(store, ids=target.ids, urls=urls, image_sha256s=sha256s)
    sweeps = [_sweep_training(settings, name, ids), _sweep_copies(settings, store, ids)]
    if reading:
        jobs = ", ".join(sorted(reading))
        sweeps.append(Sweep(left=(f"jobs were reading the index ({jobs}): run this again when they have ended",)))
    if removal is not None and removal.unpinned:
        sweeps.append(Sweep(left=tuple(_of_pin(label, removal) for label in removal.unpinned)))
    sweep = Sweep.merged(sweeps)
    report = make_report(name, now, target, num_samples, removal, sweep)
    uri = write_report(f"{corpus.uri}/{REPORTS}", now, report)
    return Takedown(uri=uri, num_samples=num_samples, removal=removal, sweep=sweep)


def _of_pin(label: str, removal: Removal) -> str:
    why = "used removed rows" if label in removal.pinned_by else "used an earlier version"
    if label.startswith((JOB, TRAINING)):
        return f"{label} {why}: it fails, and starts over on version {removal.version} when it is run again"
    return (
        f"{label} {why} and can no longer be loaded, unless it is portable: register it again on version "
        f"{removal.version}"
    )


def _sweep_training(settings: Settings, name: str, ids: pa.Array) -> Sweep:
    """Delete from training sets and evaluations; MLflow's copies first, which are found through the local files."""
    from imagerag.registry.takedown import sweep_models

    folder = settings.training_of(name)
    sets = [uri for uri in _tables(folder, "references") if _concerns(uri, _lists, ids)]
    roots = [str(settings.home), *([] if _is_inside(folder, settings.home) else [folder])]
    pages = [page for root in roots for page in _pages(root, ids)]
    runs = [results["evaluated"]["run_id"] for page in pages if (results := _results_beside(page)) is not None]
    set_names = [uri.rsplit("/", 1)[-1] for uri in sets]
    swept = sweep_models(settings, name, ids, runs, set_names)
    trained = [f"adapter {uri} learnt from the images" for uri in _trained_on(folder, set_names)]
    deleted = []
    # Without the locks, uncommitted files of another writer would be deleted too.
    with writer_lock(folder, "training"), writer_lock(f"{folder}/evaluations", "pictures"):
        for uri in _tables(folder, "real"):
            if _is_early(uri):
                _delete(uri)
                deleted.append(uri)
            elif count := KeyedTable.at(uri).drop(pa.chunked_array([ids])):
                deleted.append(f"{count} latents in {uri}")
        pictures = [uri for uri in _tables(f"{folder}/evaluations", "pictures") if _concerns(uri, _shows, ids)]
        # Features first: if this is killed, the next call finds them through the pictures.
        deleted += _sweep_features(f"{folder}/evaluations", name, pictures, ids)
        # Their index version is gone, so nothing reads them any more.
        for uri in (*sets, *pictures):
            _delete(uri)
            deleted.append(uri)
    for page in pages:
        _delete(page)
        _delete(f"{page.rsplit('/', 1)[0]}/grid.png")
        deleted.append(page)
    return Sweep.merged([swept, Sweep(deleted=tuple(deleted), left=tuple(trained))])


def _sweep_features(folder: str, index_name: str, pictures: Sequence[str], ids: pa.Array) -> list[str]:
    """Delete the features that metrics computed of deleted pictures and of the rows' images; return what was deleted.

    Only features of the index's images have its rows' ids. A table of which files are missing is one that a killed
    takedown began to delete.
    """
    from imagerag.evaluation.feature_job import FEATURES

    deleted, gone = [], {table_at(uri).name for uri in pictures}
    for uri in _tables(folder, FEATURES):
        of = (
            KeyedTable.at(uri).key["of"] if table_at(uri).exists else None
        )  # None: a killed takedown began to delete it
        if of is None or of in gone:
            _delete(uri)
            deleted.append(uri)
        elif of == index_name and (count := KeyedTable.at(uri).drop(pa.chunked_array([ids]))):
            deleted.append(f"{count} images' features in {uri}")
    return deleted


def _sweep_copies(settings: Settings, store: Store, ids: pa.Array) -> Sweep:
    """Delete models under the home that contain a copy of the index: fetched champions and pulled models.

    Only folders of models are deleted. Other copies, such as one of a whole home, are reported.
    """
    deleted = [str(path) for path in settings.home.glob(f"compare/{store.name}/scorer-*.npz")]
    copies, left = [], []
    cache = settings.home / "models"
    for copy in settings.home.glob(f"**/index/{store.name}.lance"):
        own = Store(str(copy.parent), store.name)
        is_registered = (settings.home / "mlflow") in copy.parents  # `sweep_models` handles these
        if own.table_uri == store.table_uri or is_registered or not _concerns(str(copy), _holds, ids):
            continue
        model = cache / copy.relative_to(cache).parts[0] if cache in copy.parents else copy.parent.parent
        if cache in copy.parents or (model / _PULLED).is_file():
            copies.append(str(copy.parent))
            deleted.append(str(model))
        else:
            left.append(f"{copy} is a copy of the index outside of a model's folder")
    for path in (*copies, *deleted):  # copies first: if this is killed, the rest still looks like a model
        _delete(path)
    return Sweep(deleted=tuple(deleted), left=tuple(left))


def _tables(folder: str, kind: str) -> list[str]:
    filesystem, root = fsspec.url_to_fs(folder)
    found = filesystem.glob(f"{root}/{kind}-*.lance")
    return [filesystem.unstrip_protocol(path).removeprefix("file://") for path in found]


def _concerns(uri: str, contains: Callable[[str, pa.Array], bool], ids: pa.Array) -> bool:
    """Return whether a table contains the rows, or may contain them.

    It may if a killed takedown had begun to delete it, so that files are missing, or if it is of an early version, in
    which ids were texts.
    """
    if not table_at(uri).exists or _is_early(uri):
        return True
    try:
        return contains(uri, ids)
    except (OSError, ValueError) as error:  # what Lance and Arrow raise for a missing file
        if "not found" not in str(error).lower():
            raise
        return True


def _is_early(uri: str) -> bool:
    return bool(table_at(uri).dataset().schema.field("id").type != ID)


def _holds(uri: str, ids: pa.Array) -> bool:
    return holds(table_at(uri).dataset(), ids)


def _lists(uri: str, ids: pa.Array) -> bool:
    batches = KeyedTable.at(uri).dataset().to_batches(columns=["id", "references"])
    named = chain.from_iterable((rows["id"], pc.list_flatten(rows["references"])) for rows in batches)
    return any(pc.any(pc.is_in(each, ids)).as_py() for each in named)


def _shows(uri: str, ids: pa.Array) -> bool:
    taken, batches = {*to_hex(ids)}, KeyedTable.at(uri).dataset().to_batches(columns=["references"])
    texts = (text for rows in batches for text in rows["references"].to_pylist())
    return any(reference["id"] in taken for text in texts for reference in json.loads(text))


def _pages(folder: str, ids: pa.Array) -> Iterator[str]:
    """Yield HTML pages that show one of the rows, recognised by its id in `data-row`."""
    filesystem, root = fsspec.url_to_fs(folder)
    marks = [f'data-row="{id}"'.encode() for id in to_hex(ids)]
    for path in filesystem.glob(f"{root}/**/*.html"):
        content = filesystem.cat_file(path)
        if any(mark in content for mark in marks):
            yield filesystem.unstrip_protocol(path).removeprefix("file://")


def _results_beside(page: str) -> dict[str, dict[str, str]] | None:
    return read_json(f"{page.rsplit('/', 1)[0]}/results.json")


def _trained_on(folder: str, set_names: Collection[str]) -> Iterator[str]:
    filesystem, root = fsspec.url_to_fs(folder)
    for path in filesystem.glob(f"{root}/finetuned/*/finetune.json"):
        manifest = json.loads(filesystem.cat_file(path))
        if manifest.get("training_set", {}).get("references_uri", "").rsplit("/", 1)[-1] in set_names:
            yield path.rsplit("/", 1)[0]


def _delete(uri: str) -> None:
    filesystem, path = fsspec.url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def _is_inside(uri: str, folder: Path) -> bool:
    filesystem, path = fsspec.url_to_fs(uri)
    return isinstance(filesystem, LocalFileSystem) and folder in Path(path).parents
