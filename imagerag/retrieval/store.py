"""A LanceDB table of image and caption pairs: creation, appending, deletion and cleaning up.

Workers write fragments, which are invisible until the driver commits them all at once. Every operation is one
transaction or can be repeated, so a writer may be killed at any time: the table is then in its old or its new state.
"""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

import fsspec
import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance import LanceDataset, LanceOperation
from lance.fragment import FragmentMetadata, write_fragments

from imagerag.artifacts import IndexVersion
from imagerag.errors import UserError, VersionGoneError
from imagerag.retrieval.schema import EncoderIdentity, encoder_of, row_schema
from imagerag.storage.locks import OnWait, check_locks, local_folder, writer_lock
from imagerag.storage.spool import MEMORY_ROWS

logger = logging.getLogger(__name__)

_FRAGMENT_ROWS = 2_048
"""Fragments with fewer rows are merged. This limits what a small update rewrites, including images and features, and
what a worker of the features job processes at a time."""
_MOST_FRAGMENTS = 4_096
"""Intended maximum number of fragments, all of which every version lists; larger tables get larger fragments."""
_FRAGMENT_BYTES = 2**29
"""Maximum bytes of embeddings and features in a fragment that has more than `_FRAGMENT_ROWS` rows."""
_REWRITTEN_SHARE = 1 / 8
"""Maximum share of a table that one compaction rewrites to enlarge fragments; the next one continues."""
_LOOK_UPS = 1_000
"""Maximum number of values that are looked up in an index; for more, the column is read."""


class CommitConflictError(RuntimeError):
    """Another writer changed the table since it was read. Nothing was committed: read it again and recompute."""


@dataclass(frozen=True)
class Store:
    """A table of a LanceDB database. It holds no open handle, so it can be pickled and sent to workers."""

    uri: str
    """The database: a folder or an object-store URI, whose credentials and endpoint come from `AWS_*` variables."""
    name: str

    @property
    def table_uri(self) -> str:
        """URI of the table's folder."""
        return f"{self.uri.rstrip('/')}/{self.name}.lance"

    @property
    def exists(self) -> bool:
        """Whether the table exists."""
        return self._open() is not None

    def dataset(self, version: int | None = None) -> LanceDataset:
        """Open a version of the table, the newest by default.

        Raises:
            UserError: if there is no such table.
            VersionGoneError: if the table exists, but not (or no longer) in this version.
        """
        dataset = self._open(version)
        if dataset is not None:
            return dataset
        if version is not None and self.exists:
            raise VersionGoneError(
                f"version {version} of table {self.name!r} in {self.uri} is gone, by a takedown or by publications "
                "since. Run the same again: it uses the version that is published now, which "
                f"`imagerag index status --name {self.name}` shows"
            )
        raise UserError(
            f"there is no table {self.name!r} in {self.uri}: `imagerag ingest` makes it from a list of image URLs"
        )

    def has(self, version: int) -> bool:
        """Return whether the table exists and has this version."""
        return self._open(version) is not None

    def index_version(self, version: int) -> IndexVersion:
        """Return the artifact that refers to a version of the table.

        Raises:
            UserError: see `dataset`.
        """
        created_at = self.created_at(version).isoformat()
        return IndexVersion(uri=self.uri, name=self.name, version=version, created_at=created_at)

    def created_at(self, version: int) -> datetime:
        """Return the creation time of a version, which distinguishes it from the same number in a re-created table."""
        timestamp: datetime = self.dataset(version).get_version()["timestamp"]
        return timestamp.astimezone(UTC)

    def copy(self, version: int, uri: str) -> "Store":
        """Copy a version with its indexes into another database, where it has the same number and is the only version.

        Rows have the same order there, and searches the same results.
        """
        copy = Store(uri, self.name)
        if (folder := local_folder(uri)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.dataset(version).deep_clone(copy.table_uri, version)
        return copy

    def _open(self, version: int | None = None) -> LanceDataset | None:
        try:
            return lance.dataset(self.table_uri, version=version)
        except ValueError as error:  # Lance has no specific exception for this.
            if "was not found" not in str(error):
                raise
            return None

    @property
    def encoder(self) -> EncoderIdentity:
        """The encoder that made the table's embeddings."""
        return encoder_of(self.dataset().schema)

    @property
    def version(self) -> int:
        """The newest version, published or not."""
        return int(self.dataset().version)

    def count(self) -> int:
        """Return the number of rows in the newest version."""
        return int(self.dataset().count_rows())

    def ids(self) -> pa.ChunkedArray:
        """Return the ids of all rows of the newest version, in no particular order."""
        return self.dataset().to_table(columns=["id"])["id"]

    def create(self, encoder: EncoderIdentity) -> None:
        """Create an empty table for embeddings of `encoder`."""
        if (folder := local_folder(self.uri)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
        lance.write_dataset(row_schema(encoder).empty_table(), self.table_uri, mode="create")

    def open_or_create(self, encoder: EncoderIdentity) -> None:
        """Create the table if it does not exist.

        Raises:
            UserError: if the table has embeddings of another encoder.
        """
        with self.writer_lock():
            if not self.exists:
                self.create(encoder)
        self.check_encoder(encoder)

    def check_encoder(self, encoder: EncoderIdentity) -> None:
        """Make sure that embeddings of `encoder` can be compared with the table's.

        Raises:
            UserError: if another encoder made the table's embeddings.
        """
        own = self.encoder
        if (own.digest, own.dim) != (encoder.digest, encoder.dim):
            raise UserError(
                f"a table holds one encoder's embeddings: {self.name!r} in {self.uri} was made with {own.id} "
                f"(digest {own.digest}, {own.dim} dimensions), not with {encoder.id} (digest {encoder.digest}, "
                f"{encoder.dim} dimensions). Use that encoder or another table name"
            )

    def write_fragments(self, rows: pa.Table) -> list[str]:
        """Write rows to files that belong to no version yet, and return what `commit` needs to add them.

        May run in any process. The driver must hold `writer_lock` until it has committed, because any holder of the
        lock may delete files that belong to no version.
        """
        # Cached features, the nullable columns, are computed later, by base models that are unknown here.
        schema = pa.schema([field for field in self.dataset().schema if field.nullable is False])
        fragments = write_fragments(rows.select(schema.names).cast(schema), self.table_uri, schema=schema)
        return [json.dumps(fragment.to_json()) for fragment in fragments]

    def commit(self, fragments: Sequence[str], read_version: int) -> int:
        """Append fragments as one transaction and return the new version.

        Raises:
            CommitConflictError: if the table is no longer at `read_version`, the version in which the caller determined
                the missing rows. The rows of the fragments are then not in the table.
        """
        return append(self.dataset(), fragments, read_version)

    def delete(self, ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> int:
        """Delete the rows with these ids in one transaction; return their number.

        If there are none, no new version is made. The bytes stay in the files until the table is compacted and its
        older versions are removed.
        """
        dataset = self.dataset()
        doomed = rows_with(dataset, "id", ids, ["id"])["id"]
        if len(doomed) > 0:
            check_locks()
            dataset.merge_insert("id").when_matched_delete().execute(pa.table({"id": pc.unique(doomed)}))
        return len(doomed)

    def set_tag(self, tag: str, version: int) -> None:
        """Create a tag for a version, or move it there. The caller must hold a lock that all the tag's writers take."""
        check_locks()
        tags = self.dataset().tags
        try:
            if tag not in tags.list():
                tags.create(tag, version)
                return
        except ValueError as error:  # A retry fails if the store had written the tag but answered with an error.
            if "already exists" not in str(error):
                raise
        tags.update(tag, version)

    def drop_tag(self, tag: str) -> None:
        """Remove a tag, if it exists."""
        check_locks()
        tags = self.dataset().tags
        if tag not in tags.list():
            return
        try:
            tags.delete(tag)
        except (OSError, ValueError):
            if tag in tags.list():
                raise

    def clean_up(self) -> None:
        """Delete the files of versions that are neither tagged nor the newest, and files left by killed writers.

        The caller must hold `writer_lock`. On an object store, where a worker may briefly outlive the lock of its
        driver, left-over files are deleted only once they are seven days old.
        """
        with self.tags_lock():
            check_locks()
            self.dataset().cleanup_old_versions(
                older_than=timedelta(0),
                delete_unverified=local_folder(self.uri) is not None,
                error_if_tagged_old_versions=False,
            )

    def writer_lock(self) -> AbstractContextManager[None]:
        """Lock out this table's other writers; see `imagerag.storage.locks`."""
        return writer_lock(self.uri, self.name)

    def update_lock(self, on_wait: OnWait = logger.info) -> AbstractContextManager[None]:
        """Lock out other jobs that update the table in several steps, each of which also takes `writer_lock`."""
        return writer_lock(self.uri, f"{self.name}.update", on_wait)

    def tags_lock(self) -> AbstractContextManager[None]:
        """Lock out cleaning up while a version is being tagged. Held briefly, whereas writers may take hours."""
        return writer_lock(self.uri, f"{self.name}.tags")


def batches_of(dataset: LanceDataset, columns: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
    """Yield columns of all rows in batches of about `num_rows`, however small the table's fragments are."""
    held: list[pa.RecordBatch] = []
    for batch in dataset.scanner(columns=list(columns), batch_size=num_rows).to_reader():
        held.append(batch)
        if sum(each.num_rows for each in held) >= num_rows:
            yield pa.Table.from_batches(held)
            held.clear()
    if held:
        yield pa.Table.from_batches(held)


def rows_with(
    dataset: LanceDataset,
    column: str,
    values: pa.Array | pa.ChunkedArray | Collection[str],
    columns: Sequence[str],
) -> pa.Table:
    """Return `columns` of the rows that have one of `values` in a text column.

    A few values are looked up in the column's index, if it has one; for many, the columns are read once, in batches.
    """
    if len(values) > _LOOK_UPS:
        wanted = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(list(values), pa.string())
        read = sorted({column, *columns})
        # Large batches, because the values are hashed again for each batch.
        parts = batches_of(dataset, read, MEMORY_ROWS)
        found = [part.filter(pc.is_in(part[column], wanted)) for part in parts]
        empty = pa.schema([dataset.schema.field(name) for name in read]).empty_table()
        return pa.concat_tables([empty, *found]).select(columns)
    texts = values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else values
    quoted = ", ".join("'" + text.replace("'", "''") + "'" for text in texts)
    return dataset.to_table(columns=list(columns), filter=f"{column} IN ({quoted})" if texts else "false")


def list_stores(uri: str) -> list[Store]:
    """Return the tables of a database, sorted by name; empty if there is no database."""
    filesystem, folder = fsspec.url_to_fs(uri)
    tables = filesystem.glob(f"{folder.rstrip('/')}/*.lance")
    names = sorted(PurePosixPath(table).stem for table in tables)
    # A table with a dot in its name belongs to a corpus, such as its blocklist.
    return [Store(uri, name) for name in names if "." not in name]


def append(dataset: LanceDataset, fragments: Sequence[str], read_version: int) -> int:
    """Append fragments to the newest version of a table; see `Store.commit`."""
    check_locks()
    if dataset.version != read_version:
        raise CommitConflictError(f"{dataset.uri} was read at version {read_version} and is now at {dataset.version}")
    if not fragments:
        return read_version
    adopted = [FragmentMetadata.from_json(fragment) for fragment in fragments]
    dataset = LanceDataset.commit(dataset.uri, LanceOperation.Append(adopted), read_version=read_version)
    if dataset.version != read_version + 1:
        # Lance detects no conflict between appends. If no lock separates writers, both may get here.
        _drop_fragments(dataset, adopted)
        raise CommitConflictError(
            f"{dataset.uri} was read at version {read_version} and another writer committed meanwhile"
        )
    return int(dataset.version)


def _drop_fragments(dataset: LanceDataset, fragments: Sequence[FragmentMetadata]) -> None:
    paths = {file.path for fragment in fragments for file in fragment.files}
    dropped = [f.fragment_id for f in dataset.get_fragments() if f.metadata.files[0].path in paths]
    operation = LanceOperation.Delete([], dropped, "false")
    LanceDataset.commit(dataset.uri, operation, read_version=dataset.version)


def compact(dataset: LanceDataset, deleted_share: float) -> None:
    """Merge small fragments, and rewrite those with a larger share of deleted rows than `deleted_share`.

    The size of fragments grows with the table. Fragments from when it was smaller are enlarged a few at a time.
    """
    dataset.optimize.compact_files(
        target_rows_per_fragment=_FRAGMENT_ROWS, materialize_deletions_threshold=deleted_share
    )
    num_rows, num_fragments = dataset.count_rows(), len(dataset.get_fragments())
    row_bytes = sum(_bytes_of(field.type) for field in dataset.schema)
    target = min(2 ** (num_rows // _MOST_FRAGMENTS).bit_length(), _FRAGMENT_BYTES // max(row_bytes, 1))
    if target > _FRAGMENT_ROWS and num_fragments > num_rows // target:
        most = max(int(num_rows * _REWRITTEN_SHARE), 2 * target)  # exceeds what is merged into one fragment
        dataset.optimize.compact_files(
            target_rows_per_fragment=target, materialize_deletions_threshold=deleted_share, max_source_rows=most
        )


def _bytes_of(kind: pa.DataType) -> int:
    """Return the bytes per value of a column of arrays, 0 for other columns."""
    if not pa.types.is_fixed_size_list(kind):
        return 0
    return int(kind.list_size * kind.value_type.bit_width // 8)
