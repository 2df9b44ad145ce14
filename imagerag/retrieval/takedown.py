"""Takedown: rows leave every version of a table, their bytes leave every file, and they do not come back."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from lance import LanceDataset

from imagerag.retrieval.ann import read_record
from imagerag.retrieval.blocklist import Column, block
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.pins import pins, unpin
from imagerag.retrieval.publish import drop_history, move_tag, published_version
from imagerag.retrieval.store import Store, rows_with


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What a takedown removed."""

    ids: tuple[str, ...]
    urls: tuple[str, ...]
    image_sha256s: tuple[str, ...]
    version: int
    """The table's version without the rows: the published one, if any was published before."""
    published: bool
    pinned_by: tuple[str, ...]
    """Labels of the pins whose version held a removed row."""
    unpinned: tuple[str, ...]
    """Labels of all pins there were: their versions are gone, whether they held such a row or not."""

    @property
    def num_rows(self) -> int:
        """How many rows were removed."""
        return len(self.ids)


def remove(
    store: Store, *, urls: Sequence[str] = (), ids: Sequence[str] = (), image_sha256s: Sequence[str] = ()
) -> Removal:
    """Take down every row with one of these URLs, ids or image hashes, and what files still hold of earlier ones.

    The values and the ids of the rows are blocked first, so that no later version with such a row is published. Then
    the rows are deleted, the remaining ones are rewritten and indexed anew, readers are moved to the result, and all
    earlier versions are deleted, pinned ones too: **no rollback past a takedown is possible**, and readers that are
    still on an earlier version must refresh. Rows that were not published yet are dropped: the next re-indexing embeds
    them again. If it is killed, call it again with the same values.

    Everything is rewritten where no row has one of the values, too: a row that a re-indexing deleted stays in its file
    until a tenth of that is gone.

    On an object store, files that a killed writer left there may hold the bytes for up to seven days more.
    """
    wanted: dict[Column, list[str]] = {"id": list(ids), "url": list(urls), "image_sha256": list(image_sha256s)}
    with store.writer_lock():
        rows = reachable_rows(store, wanted)
        pinned = pins(store)
        holders = _versions_with(store, set(pinned.values()), rows["id"])
        _return_to_published(store)
        for column, values in wanted.items():
            block(store, column, values)
        block(store, "id", rows["id"].to_pylist())
        store.delete(rows["id"])
        record = read_record(store.dataset())
        config = IndexConfig(**record.config) if record else IndexConfig()
        version = build_index(store, config, from_scratch=True).version
        published = published_version(store) is not None
        if published:
            move_tag(store, version)
            drop_history(store)
        with store.tags_lock():  # no job may pin a version between the two
            pinned |= pins(store)
            for label in pinned:
                unpin(store, label)
            store.clean_up()
    return Removal(
        ids=tuple(rows["id"].to_pylist()),
        urls=tuple(rows["url"].to_pylist()),
        image_sha256s=tuple(rows["image_sha256"].to_pylist()),
        version=version,
        published=published,
        pinned_by=tuple(sorted(label for label, version in pinned.items() if version in holders)),
        unpinned=tuple(sorted(pinned)),
    )


def reachable_rows(store: Store, wanted: Mapping[Column, Collection[str]]) -> pa.Table:
    """Return id, url and image_sha256 of rows of all versions that readers can get at, or soon may.

    Args:
        store: the table.
        wanted: a row has one of these values in one of these columns.
    """
    tagged = {int(tag["version"]) for tag in store.dataset().tags.list().values()}
    versions = [store.dataset(version) for version in sorted(tagged | {store.version})]
    columns = ["id", "url", "image_sha256"]
    found = [rows_with(version, column, values, columns) for version in versions for column, values in wanted.items()]
    return pa.concat_tables(found).group_by(columns).aggregate([])


def holds(dataset: LanceDataset, ids: pa.Array) -> bool:
    """Whether a copy of a table may hold one of the rows: it has one, or has deleted rows, which stay in its files."""
    deleted = any(fragment.num_deletions for fragment in dataset.get_fragments())
    return deleted or rows_with(dataset, "id", ids, ["id"]).num_rows > 0


def _versions_with(store: Store, versions: set[int], ids: pa.ChunkedArray) -> set[int]:
    """Return those of the versions that hold one of the rows."""
    return {version for version in versions if rows_with(store.dataset(version), "id", ids, ["id"]).num_rows > 0}


def _return_to_published(store: Store) -> None:
    """Make the published rows the newest ones again, if anything was published.

    The takedown publishes what it leaves. Rows that are not published were never checked, or are those of a job that
    was killed halfway, or a person rolled them back: readers must not get them on that way.
    """
    version = published_version(store)
    if version is not None and version != store.dataset().version:
        store.dataset(version).restore()
