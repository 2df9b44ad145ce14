"""Takedown: removes rows from all versions of a table, their bytes from all files, and blocks their return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from lance import LanceDataset

from imagerag.retrieval.blocklist import Column, block, fragments_with_blocked
from imagerag.retrieval.config import IndexConfig
from imagerag.retrieval.index import build_index, may_hold_gone_rows
from imagerag.retrieval.pins import pins, unpin
from imagerag.retrieval.publish import drop_history, move_tag, published_version
from imagerag.retrieval.store import Store
from imagerag.storage.hexadecimal import ID, to_hex
from imagerag.storage.lance_table import Values, fragments_with_deleted, rows_with


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What a takedown removed."""

    ids: tuple[str, ...]
    urls: tuple[str, ...]
    image_sha256s: tuple[str, ...]
    version: int
    """The table's version without the rows: the published one, if there was a published version before."""
    published: bool
    pinned_by: tuple[str, ...]
    """Labels of the pins whose version contained a removed row."""
    unpinned: tuple[str, ...]
    """Labels of all previous pins: their versions are gone, whether or not they contained such a row."""

    @property
    def num_rows(self) -> int:
        """Number of removed rows."""
        return len(self.ids)


def remove_rows(
    store: Store, *, urls: Sequence[str] = (), ids: Sequence[str] = (), image_sha256s: Sequence[str] = ()
) -> Removal:
    """Take down all rows with one of these URLs, ids or image hashes, and those deleted earlier but still in files.

    The values and the ids of the rows are blocked first, so that no later version with such a row is published. Then
    the rows are deleted, the files that contain them are rewritten, readers are moved to the result, and all earlier
    versions are deleted, including pinned ones: **no rollback past a takedown is possible**, and readers that are still
    on an earlier version must refresh. Unpublished rows are dropped; the next re-indexing embeds them again. If it is
    killed, call it again with the same values.

    A row that a re-indexing deleted stays in its file until a tenth of the file's rows are deleted. So files are also
    rewritten because of rows that no version has any more.

    On an object store, files that a killed writer left there may contain the bytes for up to seven more days.
    """
    wanted: dict[Column, list[str]] = {"id": list(ids), "url": list(urls), "image_sha256": list(image_sha256s)}
    with store.writer_lock():
        rows = reachable_rows(store, wanted)
        pinned = pins(store)
        holders = _versions_with(store, set(pinned.values()), rows["id"])
        _return_to_published(store)
        for column, values in wanted.items():
            block(store, column, values)
        block(store, "id", to_hex(rows["id"]))
        store.delete(rows["id"])
        store.rewrite(fragments_with_blocked(store))
        version = build_index(store, IndexConfig(), rewrite=True).version
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
        ids=tuple(to_hex(rows["id"])),
        urls=tuple(rows["url"].to_pylist()),
        image_sha256s=tuple(to_hex(rows["image_sha256"])),
        version=version,
        published=published,
        pinned_by=tuple(sorted(label for label, version in pinned.items() if version in holders)),
        unpinned=tuple(sorted(pinned)),
    )


def reachable_rows(store: Store, wanted: Mapping[Column, Values]) -> pa.Table:
    """Return id, url and image_sha256 of the wanted rows of all versions that readers can open, or soon may.

    Args:
        store: the table.
        wanted: values by column; a row is wanted if it has one of them.
    """
    tagged = {int(tag["version"]) for tag in store.dataset().tags.list().values()}
    versions = [store.dataset(version) for version in sorted(tagged | {store.version})]
    columns = ["id", "url", "image_sha256"]
    found = [rows_with(version, column, values, columns) for version in versions for column, values in wanted.items()]
    return pa.concat_tables(found).group_by(columns).aggregate([])


def holds(dataset: LanceDataset, ids: pa.Array) -> bool:
    """Return whether a copy of a table may contain one of the rows, also as a deleted row, which stays in its files.

    Copies of early versions have other ids, so they may contain any row.
    """
    if dataset.schema.field("id").type != ID or may_hold_gone_rows(dataset):
        return True
    return rows_with(dataset, "id", ids, ["id"]).num_rows > 0 or bool(fragments_with_deleted(dataset, {"id": ids}))


def _versions_with(store: Store, versions: set[int], ids: pa.ChunkedArray) -> set[int]:
    """Return those of the versions that contain one of the rows."""
    return {version for version in versions if rows_with(store.dataset(version), "id", ids, ["id"]).num_rows > 0}


def _return_to_published(store: Store) -> None:
    """Restore the published version as the newest one, if anything was published.

    The takedown publishes its result. Unpublished rows were never checked, or come from a job that was killed halfway,
    or were rolled back: the takedown must not publish them.
    """
    version = published_version(store)
    if version is not None and version != store.dataset().version:
        store.dataset(version).restore()
