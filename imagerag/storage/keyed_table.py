"""A table of computed results in a Lance dataset: rows with ids, which are added and deleted, but never changed.

The table's name contains a digest of everything that the rows depend on besides their ids. So existing rows never have
to be compared with anything, and rows are missing exactly if their ids are. Workers write fragments, which are
invisible until the driver commits them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lance import LanceDataset

from imagerag.errors import UserError
from imagerag.storage.hexadecimal import ID
from imagerag.storage.lance_table import LanceTable, rows_with, table_at

Arrays = npt.NDArray[np.floating[Any]]

_DIGITS = 16


@dataclass(frozen=True)
class KeyedTable(LanceTable):
    """A table of computed results; its name ends in a digest of their key."""

    schema: pa.Schema

    @classmethod
    def of(cls, folder: str, name: str, key: Mapping[str, Any], columns: Sequence[pa.Field]) -> "KeyedTable":
        """Return the table of rows that depend on `key`, a JSON object; a column `id` is added."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:_DIGITS]
        metadata = {b"imagerag.key": json.dumps(key, sort_keys=True).encode()}
        schema = pa.schema([pa.field("id", ID, nullable=False), *columns], metadata=metadata)
        return cls(folder, f"{name}-{digest}", schema)

    @classmethod
    def at(cls, table_uri: str) -> "KeyedTable":
        """Return an existing table.

        Raises:
            UserError: if it does not exist.
        """
        table = table_at(table_uri)
        dataset = table.find()
        if dataset is None:
            raise UserError(f"the training set's table {table_uri} is gone: make it again")
        return cls(table.uri, table.name, dataset.schema)

    @property
    def key(self) -> dict[str, Any]:
        """What the rows depend on besides their ids."""
        key: dict[str, Any] = json.loads(self.schema.metadata[b"imagerag.key"])
        return key

    @property
    def digest(self) -> str:
        """Digest of the table's key."""
        return self.name.rsplit("-", 1)[1]

    def dataset(self, version: int | None = None) -> LanceDataset:
        """Open a version, the newest by default; create an empty table if there is none."""
        dataset = self.find(version)
        return self.append(self.schema.empty_table()) if dataset is None else dataset

    def keep(self, ids: pa.ChunkedArray) -> None:
        """Delete all rows except these with `drop`."""
        own = self.ids()
        self.drop(own.filter(pc.invert(pc.is_in(own, ids))))

    def drop(self, ids: pa.ChunkedArray) -> int:
        """Delete rows from every version, and files left by killed writers; return the number of deleted rows.

        Rewrites only files that contain such a row. A training that reads one of these files fails, as it must when
        rows are taken down.
        """
        if not len(ids):
            return 0
        num_rows = self.delete(ids)
        if self._is_held(ids):  # by an earlier version, which a killed call may have left
            self.compact(deleted_share=0.0)
            self.clean_up()
        return num_rows

    def _is_held(self, ids: pa.ChunkedArray) -> bool:
        """Return whether any version has one of the rows, the latest versions first."""
        versions = (version["version"] for version in reversed(self.dataset().versions()))
        return any(len(rows_with(self.dataset(version), "id", ids, ["id"])) for version in versions)


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
