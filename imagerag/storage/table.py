"""A table of computed results in a Lance dataset: rows with ids, which are added and deleted, but never changed.

The table's name contains a digest of everything that the rows depend on besides their ids. So existing rows never have
to be compared with anything, and rows are missing exactly if their ids are. Workers write fragments, which are
invisible until the driver commits them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lance import LanceDataset
from lance.fragment import write_fragments

from imagerag.errors import UserError
from imagerag.retrieval.store import append, compact
from imagerag.storage.locks import check_locks, local_folder

Arrays = npt.NDArray[np.floating[Any]]

_DIGITS = 16


@dataclass(frozen=True)
class Table:
    """A table of computed results. It holds no open handle, so it can be pickled and sent to workers."""

    uri: str
    schema: pa.Schema

    @classmethod
    def keyed(cls, folder: str, name: str, key: Mapping[str, Any], columns: Sequence[pa.Field]) -> "Table":
        """Return the table of rows that depend on `key`, a JSON object; a column `id` is added."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:_DIGITS]
        metadata = {b"imagerag.key": json.dumps(key, sort_keys=True).encode()}
        schema = pa.schema([pa.field("id", pa.string(), nullable=False), *columns], metadata=metadata)
        return cls(f"{folder.rstrip('/')}/{name}-{digest}.lance", schema)

    @classmethod
    def at(cls, uri: str) -> "Table":
        """Return an existing table.

        Raises:
            UserError: if it does not exist.
        """
        try:
            return cls(uri, lance.dataset(uri).schema)
        except ValueError as error:
            raise UserError(f"the training set's table {uri} is gone: make it again") from error

    @property
    def digest(self) -> str:
        """Digest of the table's key."""
        return self.uri.rsplit("-", 1)[1].removesuffix(".lance")

    def open(self) -> LanceDataset:
        """Open the newest version; create an empty table if there is none."""
        try:
            return lance.dataset(self.uri)
        except ValueError as error:  # Lance has no specific exception for this.
            if "was not found" not in str(error):
                raise
            return lance.write_dataset(self.schema.empty_table(), self.uri, schema=self.schema, mode="create")

    def ids(self) -> list[str]:
        """Return the ids of all rows, in the order of `take`."""
        ids: list[str] = self.open().to_table(columns=["id"])["id"].to_pylist()
        return ids

    def keep(self, ids: pa.ChunkedArray) -> None:
        """Delete all rows except these with `drop`."""
        own = self.open().to_table(columns=["id"])["id"]
        self.drop(own.filter(pc.invert(pc.is_in(own, ids))))

    def drop(self, ids: pa.ChunkedArray) -> int:
        """Delete rows from every version, and files left by killed writers; return the number of deleted rows.

        Rewrites only files that contain such a row. A training that reads one of these files fails, as it must when
        rows are taken down.
        """
        dataset = self.open()
        own = dataset.to_table(columns=["id"])["id"]
        doomed = own.filter(pc.is_in(own, ids))
        if not len(doomed):
            return 0
        check_locks()
        dataset.merge_insert("id").when_matched_delete().execute(pa.table({"id": doomed}))
        dataset = self.open()
        compact(dataset, deleted_share=0.0)
        self.clean_up()
        return len(doomed)

    def clean_up(self) -> None:
        """Delete all versions except the newest, and files left by killed writers. No other writer may be active."""
        self.open().cleanup_old_versions(older_than=timedelta(0), delete_unverified=local_folder(self.uri) is not None)

    def write(self, rows: pa.Table) -> list[str]:
        """Write rows to files that belong to no version yet, and return what `commit` needs. Runs in any process."""
        fragments = write_fragments(rows.select(self.schema.names).cast(self.schema), self.uri, schema=self.schema)
        return [json.dumps(fragment.to_json()) for fragment in fragments]

    def commit(self, fragments: Sequence[str], read_version: int) -> int:
        """Append fragments as one transaction and return the new version.

        Raises:
            CommitConflictError: if the table is no longer at `read_version`, the version in which the caller determined
                the missing rows.
        """
        return append(self.open(), fragments, read_version)


def array_field(name: str, shape: Sequence[int], kind: pa.DataType | None = None) -> pa.Field:
    """Return a column of arrays of one shape, by default float16."""
    values = pa.list_(kind or pa.float16(), int(np.prod(shape)))
    return pa.field(name, values, metadata={b"shape": json.dumps(list(shape)).encode()})


def to_column(values: Arrays) -> pa.Array:
    """Return arrays (N, ...) as a column."""
    return pa.FixedSizeListArray.from_arrays(values.reshape(-1), int(np.prod(values.shape[1:])))


def shape_of(field: pa.Field) -> tuple[int, ...]:
    """Return the shape of the arrays in a column from `array_field`."""
    return tuple(json.loads(field.metadata[b"shape"]))


def from_column(column: pa.ChunkedArray, shape: Sequence[int]) -> Arrays:
    """Return a column without nulls as arrays (N, ...) of the given shape."""
    values: Arrays = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), *shape)
