"""A Lance table of a folder or object store: opening, appending, deletion, compaction, tags and clean-up.

Workers write fragments, which are invisible until the driver commits them all at once. Every operation is one
transaction or can be repeated, so a writer may be killed at any time: the table is then in its old or its new state.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance import LanceDataset, LanceFragment, LanceOperation
from lance.fragment import FragmentMetadata, write_fragments

from imagerag.errors import UserError
from imagerag.storage.hexadecimal import from_hex
from imagerag.storage.locks import check_locks, local_folder
from imagerag.storage.spool import MEMORY_ROWS

Values: TypeAlias = pa.Array | pa.ChunkedArray | Collection[str]
"""Values of a column; if this is binary, Python's strings are their hexadecimal digits."""

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
class LanceTable:
    """A table, usually of rows with ids. It holds no open handle, so it can be pickled and sent to workers."""

    uri: str
    """The folder or object-store URI that the table is in. `AWS_*` variables have the store's credentials."""
    name: str

    @property
    def table_uri(self) -> str:
        """URI of the table's own folder."""
        return f"{self.uri.rstrip('/')}/{self.name}.lance"

    @property
    def exists(self) -> bool:
        """Whether the table exists."""
        return self.find() is not None

    def has(self, version: int) -> bool:
        """Return whether the table exists and has this version."""
        return self.find(version) is not None

    def find(self, version: int | None = None) -> LanceDataset | None:
        """Open a version of the table, the newest by default; return None if there is none."""
        try:
            return lance.dataset(self.table_uri, version=version)
        except ValueError as error:  # Lance has no specific exception for this.
            if "was not found" not in str(error):
                raise
            return None

    def dataset(self, version: int | None = None) -> LanceDataset:
        """Open a version of the table, the newest by default.

        Raises:
            UserError: if there is no such table or version.
        """
        if (dataset := self.find(version)) is None:
            raise UserError(f"there is no table {self.table_uri}, or not in this version")
        return dataset

    @property
    def version(self) -> int:
        """The newest version."""
        return int(self.dataset().version)

    def count(self) -> int:
        """Return the number of rows in the newest version."""
        return int(self.dataset().count_rows())

    def ids(self) -> pa.ChunkedArray:
        """Return the ids of all rows of the newest version, in the order of `take`."""
        return self.dataset().to_table(columns=["id"])["id"]

    def append(self, rows: pa.Table) -> LanceDataset:
        """Append rows in one transaction; the table is created if it does not exist."""
        return lance.write_dataset(rows, self.table_uri, mode="append" if self.exists else "create")

    def write_fragments(self, rows: pa.Table) -> list[str]:
        """Write rows to files that belong to no version yet, and return what `commit` needs to add them.

        May run in any process. Until the driver has committed, it must hold the lock of those who clean the table up,
        because cleaning up may delete files that belong to no version.
        """
        schema = self.written_schema()
        fragments = write_fragments(rows.select(schema.names).cast(schema), self.table_uri, schema=schema)
        return [json.dumps(fragment.to_json()) for fragment in fragments]

    def written_schema(self) -> pa.Schema:
        """Return the columns that `write_fragments` writes."""
        return self.dataset().schema

    def commit(self, fragments: Sequence[str], read_version: int) -> int:
        """Append fragments as one transaction and return the new version.

        Raises:
            CommitConflictError: if the table is no longer at `read_version`, the version in which the caller determined
                the missing rows. The rows of the fragments are then not in the table.
        """
        check_locks()
        if (version := self.version) != read_version:
            raise CommitConflictError(f"{self.table_uri} was read at version {read_version} and is now at {version}")
        if not fragments:
            return read_version
        adopted = [FragmentMetadata.from_json(fragment) for fragment in fragments]
        dataset = self.transact(LanceOperation.Append(adopted), read_version)
        if dataset.version != read_version + 1:
            # Lance detects no conflict between appends. If no lock separates writers, both may get here.
            paths = {file.path for fragment in adopted for file in fragment.files}
            dropped = [f.fragment_id for f in dataset.get_fragments() if f.metadata.files[0].path in paths]
            self.transact(LanceOperation.Delete([], dropped, "false"), dataset.version)
            raise CommitConflictError(
                f"{self.table_uri} was read at version {read_version} and another writer committed meanwhile"
            )
        return int(dataset.version)

    def transact(self, operation: LanceOperation.BaseOperation, read_version: int) -> LanceDataset:
        """Commit an operation that was prepared on a version, and return the new version.

        Raises:
            CommitConflictError: if Lance finds that another writer changed what the operation changes.
        """
        check_locks()
        try:
            return LanceDataset.commit(self.table_uri, operation, read_version=read_version)
        except OSError as error:  # Lance has no specific exceptions for these.
            if not any(reason in str(error).lower() for reason in ("conflict", "was not found")):
                raise
            raise CommitConflictError(f"another writer changed table {self.name!r}: {error}") from error

    def delete(self, ids: Values) -> int:
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

    def compact(self, deleted_share: float) -> None:
        """Merge small fragments, and rewrite those with a larger share of deleted rows than `deleted_share`.

        The size of fragments grows with the table. Fragments from when it was smaller are enlarged a few at a time.
        """
        dataset = self.dataset()
        dataset.optimize.compact_files(
            target_rows_per_fragment=_FRAGMENT_ROWS, materialize_deletions_threshold=deleted_share
        )
        num_rows, num_fragments, target = dataset.count_rows(), len(dataset.get_fragments()), _fragment_rows(dataset)
        if target > _FRAGMENT_ROWS and num_fragments > num_rows // target:
            most = max(int(num_rows * _REWRITTEN_SHARE), 2 * target)  # exceeds what is merged into one fragment
            dataset.optimize.compact_files(
                target_rows_per_fragment=target, materialize_deletions_threshold=deleted_share, max_source_rows=most
            )

    def rewrite(self, fragment_ids: Collection[int]) -> None:
        """Rewrite these fragments without their deleted rows, and no others."""
        if not fragment_ids:
            return
        check_locks()
        dataset = self.dataset()
        others = {fragment.fragment_id for fragment in dataset.get_fragments()}.difference(fragment_ids)
        dataset.optimize.compact_files(
            target_rows_per_fragment=max(_fragment_rows(dataset), _FRAGMENT_ROWS),
            materialize_deletions_threshold=0.0,
            excluded_fragment_ids=sorted(others),
        )

    def clean_up(self) -> None:
        """Delete the files of versions that are neither tagged nor the newest, and files left by killed writers.

        No other writer may be active. On an object store, where a worker may briefly outlive the lock of its driver,
        left-over files are deleted only once they are seven days old.
        """
        check_locks()
        self.dataset().cleanup_old_versions(
            older_than=timedelta(0),
            delete_unverified=local_folder(self.uri) is not None,
            error_if_tagged_old_versions=False,
        )

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


def table_at(table_uri: str) -> LanceTable:
    """Return the table with this URI (`LanceTable.table_uri`), whether it exists or not."""
    uri, _, file = table_uri.rpartition("/")
    return LanceTable(uri, file.removesuffix(".lance"))


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


def changed_fragments(before: LanceDataset, after: LanceDataset) -> tuple[list[LanceFragment], list[LanceFragment]]:
    """Return the fragments with rows that the other version does not have: those of `before`, and those of `after`.

    A fragment's rows are those of its first data file that are not in its deletion file; columns that are added later
    are in further data files.
    """

    def by_rows(dataset: LanceDataset) -> dict[tuple[str, str | None], LanceFragment]:
        return {(first_file(fragment), fragment.deletion_file()): fragment for fragment in dataset.get_fragments()}

    old, new = by_rows(before), by_rows(after)
    return [old[key] for key in old if key not in new], [new[key] for key in new if key not in old]


def first_file(fragment: LanceFragment) -> str:
    """Return the path of the data file with a fragment's first columns, which is never written to again."""
    return str(fragment.metadata.files[0].path)


def rows_with(
    dataset: LanceDataset,
    column: str,
    values: Values,
    columns: Sequence[str],
) -> pa.Table:
    """Return `columns` of the rows that have one of `values` in a column of texts or binary.

    A few values are looked up in the column's index, if it has one; for many, the columns are read once, in batches.

    Raises:
        UserError: if a string is not the hexadecimal digits of a value of a binary column.
    """
    kind = dataset.schema.field(column).type
    wanted = values_of(kind, values)
    if len(wanted) > _LOOK_UPS:
        read = sorted({column, *columns})
        # Large batches, because the values are hashed again for each batch.
        parts = batches_of(dataset, read, MEMORY_ROWS)
        found = [part.filter(pc.is_in(part[column], wanted)) for part in parts]
        empty = pa.schema([dataset.schema.field(name) for name in read]).empty_table()
        return pa.concat_tables([empty, *found]).select(columns)
    literals = ", ".join(map(literal, wanted.to_pylist()))
    return dataset.to_table(columns=list(columns), filter=f"{column} IN ({literals})" if literals else "false")


def fragments_with_deleted(dataset: LanceDataset, values: Mapping[str, Values]) -> list[int]:
    """Return the fragments whose files contain a deleted row that has one of `values`, which are given by column."""
    wanted = {column: values_of(dataset.schema.field(column).type, own) for column, own in values.items()}

    def contains_one(fragment: LanceFragment) -> bool:
        rows = fragment.scanner(columns=[*wanted], include_deleted_rows=True, with_row_id=True).to_table()
        return any(pc.any(pc.is_in(rows[column], own)).as_py() for column, own in wanted.items())

    fragments = (fragment for fragment in dataset.get_fragments() if fragment.num_deletions)
    return [fragment.fragment_id for fragment in fragments if contains_one(fragment)]


def values_of(kind: pa.DataType, values: Values) -> pa.Array | pa.ChunkedArray:
    """Return values of a column of this type; see `Values`."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    return from_hex(values, kind) if pa.types.is_fixed_size_binary(kind) else pa.array(list(values), kind)


def literal(value: str | bytes) -> str:
    """Return a value as SQL, which has no bound parameters in Lance."""
    return f"X'{value.hex()}'" if isinstance(value, bytes) else "'" + value.replace("'", "''") + "'"


def _fragment_rows(dataset: LanceDataset) -> int:
    """Return the number of rows that fragments of a table of this size should have."""
    row_bytes = sum(_bytes_of(field.type) for field in dataset.schema)
    num_rows = int(dataset.count_rows())
    return int(min(2 ** (num_rows // _MOST_FRAGMENTS).bit_length(), _FRAGMENT_BYTES // max(row_bytes, 1)))


def _bytes_of(kind: pa.DataType) -> int:
    """Return the bytes per value of a column of arrays, 0 for other columns."""
    if not pa.types.is_fixed_size_list(kind):
        return 0
    return int(kind.list_size * kind.value_type.bit_width // 8)
