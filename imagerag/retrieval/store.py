"""One LanceDB table of image and caption pairs: created, appended to, deleted from and cleaned up.

Workers write fragments, which nobody sees; the driver commits them all at once. Every operation is one transaction or
can be repeated, so a writer may die at any moment: the table is then as it was or as it should be.
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
from imagerag.locks import OnWait, check_locks, local_folder, writer_lock
from imagerag.retrieval.schema import EncoderIdentity, encoder_of, row_schema
from imagerag.spool import MEMORY_ROWS

logger = logging.getLogger(__name__)

_FRAGMENT_ROWS = 2_048
"""Fragments below this are merged. It bounds what a small update rewrites, images and features included, and is what a
worker of the features job has in hand."""
_MOST_FRAGMENTS = 4_096
"""That every version lists; a table of more rows gets larger fragments."""
_FRAGMENT_BYTES = 2**29
"""Of a row's embeddings and features, in a fragment that is larger than `_FRAGMENT_ROWS`."""
_REWRITTEN_SHARE = 1 / 8
"""Of a table, at most, that one compaction rewrites to make fragments larger; the next one goes on."""
_LOOK_UPS = 1_000
"""Values that are looked up by an index; more of them are found by reading the column."""


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
        """Where the table's files are."""
        return f"{self.uri.rstrip('/')}/{self.name}.lance"

    @property
    def exists(self) -> bool:
        """Whether the table was created."""
        return self._open() is not None

    def dataset(self, version: int | None = None) -> LanceDataset:
        """Open a version of the table, the newest by default.

        Raises:
            UserError: if there is no such table.
            VersionGoneError: if there is no longer such a version.
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
        """Whether the table is there, and has this version."""
        return self._open(version) is not None

    def index_version(self, version: int) -> IndexVersion:
        """Return a version of the table as others are told of it.

        Raises:
            UserError: as of `dataset`.
        """
        created_at = self.created_at(version).isoformat()
        return IndexVersion(uri=self.uri, name=self.name, version=version, created_at=created_at)

    def created_at(self, version: int) -> datetime:
        """Return when a version was made. It tells it from one of the same number in a table made anew."""
        timestamp: datetime = self.dataset(version).get_version()["timestamp"]
        return timestamp.astimezone(UTC)

    def copy(self, version: int, uri: str) -> "Store":
        """Copy a version with its indexes into another database. It has the same number there, and is the only one.

        Rows come in the same order and searches find the same as here.
        """
        copy = Store(uri, self.name)
        if (folder := local_folder(uri)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.dataset(version).deep_clone(copy.table_uri, version)
        return copy

    def _open(self, version: int | None = None) -> LanceDataset | None:
        try:
            return lance.dataset(self.table_uri, version=version)
        except ValueError as error:  # Lance has no exception of its own for this.
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
        """Make an empty table for `encoder`'s rows."""
        if (folder := local_folder(self.uri)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
        lance.write_dataset(row_schema(encoder).empty_table(), self.table_uri, mode="create")

    def open_or_create(self, encoder: EncoderIdentity) -> None:
        """Make the table unless it is there.

        Raises:
            UserError: if the table holds another encoder's rows.
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
        """Write rows to files that belong to no version yet, and return what `commit` needs to adopt them.

        May run in any process. The driver must hold `writer_lock` until it has committed, because whoever holds the
        lock may delete files that belong to no version.
        """
        # Cached features are computed later, by base models that this writer doesn't know.
        schema = pa.schema([field for field in self.dataset().schema if field.nullable is False])
        fragments = write_fragments(rows.select(schema.names).cast(schema), self.table_uri, schema=schema)
        return [json.dumps(fragment.to_json()) for fragment in fragments]

    def commit(self, fragments: Sequence[str], read_version: int) -> int:
        """Append fragments as one transaction and return the new version.

        Raises:
            CommitConflictError: if the table is no longer the one of `read_version`, the version in which the caller
                looked which rows are missing. The rows of the fragments are then not in the table.
        """
        return append(self.dataset(), fragments, read_version)

    def delete(self, ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> int:
        """Delete the rows with these ids in one transaction, and return how many there were.

        Where there are none, no version is made. The bytes stay in the files until the table is compacted and its older
        versions are removed.
        """
        dataset = self.dataset()
        doomed = rows_with(dataset, "id", ids, ["id"])["id"]
        if len(doomed) > 0:
            check_locks()
            dataset.merge_insert("id").when_matched_delete().execute(pa.table({"id": pc.unique(doomed)}))
        return len(doomed)

    def set_tag(self, tag: str, version: int) -> None:
        """Let a tag name a version, whatever it named before. Call it under a lock that its other writers take."""
        check_locks()
        tags = self.dataset().tags
        try:
            if tag not in tags.list():
                tags.create(tag, version)
                return
        except ValueError as error:  # Lance doesn't know its own of a store that wrote it and answered by an error.
            if "already exists" not in str(error):
                raise
        tags.update(tag, version)

    def drop_tag(self, tag: str) -> None:
        """Remove a tag, if there is one."""
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
        """Delete the files of versions that are neither tagged nor the newest, and what killed writers left behind.

        Call it under `writer_lock`. On an object store, where a worker may outlive the lock of its driver for a moment,
        left-over files are deleted when they are seven days old.
        """
        with self.tags_lock():
            check_locks()
            self.dataset().cleanup_old_versions(
                older_than=timedelta(0),
                delete_unverified=local_folder(self.uri) is not None,
                error_if_tagged_old_versions=False,
            )

    def writer_lock(self) -> AbstractContextManager[None]:
        """Keep this table's other writers out, see `imagerag.locks`."""
        return writer_lock(self.uri, self.name)

    def update_lock(self, on_wait: OnWait = logger.info) -> AbstractContextManager[None]:
        """Keep others out who bring the table up to date in several steps; each of these takes `writer_lock`, too."""
        return writer_lock(self.uri, f"{self.name}.update", on_wait)

    def tags_lock(self) -> AbstractContextManager[None]:
        """Keep a version from being cleaned up while it is tagged. Held for moments, while writers take hours."""
        return writer_lock(self.uri, f"{self.name}.tags")


def batches_of(dataset: LanceDataset, columns: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
    """Yield columns of all rows, about so many at a time, however small the table's fragments are."""
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
    """Return `columns` of the rows that have one of `values` in a column of texts.

    A few values are asked of the column's index, where there is one; for many, the columns are read once, in batches.
    """
    if len(values) > _LOOK_UPS:
        wanted = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(list(values), pa.string())
        read = sorted({column, *columns})
        # Of many rows at a time, because each time the values are hashed anew.
        parts = batches_of(dataset, read, MEMORY_ROWS)
        found = [part.filter(pc.is_in(part[column], wanted)) for part in parts]
        empty = pa.schema([dataset.schema.field(name) for name in read]).empty_table()
        return pa.concat_tables([empty, *found]).select(columns)
    texts = values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else values
    quoted = ", ".join("'" + text.replace("'", "''") + "'" for text in texts)
    return dataset.to_table(columns=list(columns), filter=f"{column} IN ({quoted})" if texts else "false")


def list_stores(uri: str) -> list[Store]:
    """Return the tables of a database, in the order of their names; none if there is no database."""
    filesystem, folder = fsspec.url_to_fs(uri)
    tables = filesystem.glob(f"{folder.rstrip('/')}/*.lance")
    names = sorted(PurePosixPath(table).stem for table in tables)
    # A name with a dot is not a corpus but belongs to one, such as the list of what was taken down.
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
        # Lance sees no conflict between appends. Where no lock keeps writers apart, both may get here.
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
    """Merge small fragments, and rewrite those of which more than `deleted_share` is deleted.

    The size of fragments follows that of the table. Those that were made when it was smaller grow a part at a time.
    """
    dataset.optimize.compact_files(
        target_rows_per_fragment=_FRAGMENT_ROWS, materialize_deletions_threshold=deleted_share
    )
    num_rows, num_fragments = dataset.count_rows(), len(dataset.get_fragments())
    row_bytes = sum(_bytes_of(field.type) for field in dataset.schema)
    target = min(2 ** (num_rows // _MOST_FRAGMENTS).bit_length(), _FRAGMENT_BYTES // max(row_bytes, 1))
    if target > _FRAGMENT_ROWS and num_fragments > num_rows // target:
        most = max(int(num_rows * _REWRITTEN_SHARE), 2 * target)  # what is merged into one is less than that
        dataset.optimize.compact_files(
            target_rows_per_fragment=target, materialize_deletions_threshold=deleted_share, max_source_rows=most
        )


def _bytes_of(kind: pa.DataType) -> int:
    """Return the bytes of a value of a column of arrays, 0 for others."""
    if not pa.types.is_fixed_size_list(kind):
        return 0
    return int(kind.list_size * kind.value_type.bit_width // 8)
