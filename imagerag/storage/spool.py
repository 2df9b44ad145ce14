"""Tables that may be larger than memory: kept in order, regrouped by URL or id, or without repetitions.

Up to `MEMORY_ROWS` rows (and `MEMORY_BYTES`) stay in memory. Larger tables are written to temporary files (in
`TMPDIR`), which are deleted with the object that uses them; memory then holds at most that many rows, or one of
`NUM_PARTS` parts, whichever is more.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from tempfile import TemporaryFile
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

MEMORY_ROWS = 2**18
NUM_PARTS = 256
MEMORY_BYTES = 2**28
_LAST_BYTES = pa.array([bytes([number]) for number in range(NUM_PARTS)])
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


class Spool:
    """Rows in the order in which they were appended."""

    def __init__(self, schema: pa.Schema) -> None:
        self.num_rows = 0
        self._schema = schema
        self._held = _Held()
        self._file: _File | None = None
        self._places: list[int] = []
        self._sha256 = hashlib.sha256()

    @classmethod
    def of(cls, table: pa.Table) -> "Spool":
        """Return a spool that contains a table."""
        spool = cls(table.schema)
        spool.append(table)
        return spool

    def append(self, rows: pa.Table) -> None:
        """Append rows."""
        self.num_rows += rows.num_rows
        for batch in rows.to_batches():  # now, so that no temporary file is read again for it
            self._sha256.update(batch.serialize())
        self._held.append(rows)
        if self._held.is_much:
            self._file = self._file or _File()
            self._places.append(self._file.write(self._held.take()))

    def __iter__(self) -> Iterator[pa.Table]:
        for place in self._places:
            assert self._file is not None
            yield self._file.read(place)
        yield from self._held.tables

    def table(self) -> pa.Table:
        """Return all rows, in memory."""
        return pa.concat_tables([self._schema.empty_table(), *self])

    def digest(self) -> str:
        """Return a SHA-256 of the rows and of the batches that they were appended in."""
        return self._sha256.hexdigest()


class Parts:
    """Rows grouped into numbered parts; rows within a part keep their order."""

    def __init__(self, tables: Iterable[pa.Table], part_of: Callable[[pa.Table], npt.NDArray[np.int64]]) -> None:
        self._part_of = part_of
        self._held = _Held()
        self._file: _File | None = None
        self._places: dict[int, list[int]] = {}
        self.num_rows = 0
        for table in tables:
            self.num_rows += table.num_rows
            self._held.append(table)
            if self._held.is_much:
                self._spill()
        if self.is_spilled and self._held.tables:
            self._spill()

    @property
    def is_spilled(self) -> bool:
        """Whether the rows were too many for memory."""
        return self._file is not None

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield the non-empty parts in order, or all rows as one part if they fit in memory."""
        if self.is_spilled:
            yield from (self._read(part) for part in sorted(self._places))
        elif self._held.tables:
            yield pa.concat_tables(self._held.tables)

    def part(self, number: int) -> pa.Table | None:
        """Return the rows of a part, or None if it has none."""
        if self._held.tables:
            self._spill()
        return self._read(number) if number in self._places else None

    def _read(self, part: int) -> pa.Table:
        assert self._file is not None
        return pa.concat_tables(map(self._file.read, self._places[part]))

    def _spill(self) -> None:
        self._file = self._file or _File()
        rows = self._held.take()
        parts = self._part_of(rows)
        order = np.argsort(parts, kind="stable")
        rows, parts = rows.take(pa.array(order)), parts[order]
        starts = np.flatnonzero(np.diff(parts, prepend=-1)).tolist()
        for start, end in zip(starts, [*starts[1:], len(parts)], strict=True):
            if start < end:
                place = self._file.write(rows.slice(start, end - start))
                self._places.setdefault(int(parts[start]), []).append(place)


def by_url(rows: pa.Table) -> npt.NDArray[np.int64]:
    """Return the part number of each row; all rows of a URL have the same."""
    urls = (url for chunk in rows["url"].chunks for url in chunk.cast(pa.binary()).to_pylist())
    return np.fromiter((crc32(url) % NUM_PARTS for url in urls), np.int64, rows.num_rows)


def by_id(rows: pa.Table) -> npt.NDArray[np.int64]:
    """Return the part number of each row by its `id`, whose last byte is evenly distributed."""
    places = pc.index_in(pc.binary_slice(rows["id"], -1), _LAST_BYTES)
    parts: npt.NDArray[np.int64] = places.to_numpy().astype(np.int64)
    return parts


def numbered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Add a column `row`, the position of each row among all rows."""
    start = 0
    for table in tables:
        yield table.append_column("row", pa.array(np.arange(start, start + table.num_rows)))
        start += table.num_rows


def in_order(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield rows sorted by `row`."""
    for part in Parts(tables, lambda rows: rows["row"].to_numpy() // MEMORY_ROWS):
        yield part.take(pc.sort_indices(part["row"]))


def aligned(*tables: Parts) -> Iterator[tuple[pa.Table | None, ...]]:
    """Yield the parts of several tables with the same number; None stands for an empty part."""
    if any(table.is_spilled for table in tables):
        yield from (tuple(table.part(number) for table in tables) for number in range(NUM_PARTS))
    else:
        yield tuple(next(iter(table), None) for table in tables)


def distinct(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the first row of every (url, caption), in order."""
    for part in in_order(map(first_of_each, Parts(numbered(tables), by_url))):
        yield part.drop_columns("row")


def first_of_each(rows: pa.Table) -> pa.Table:
    """Return the first row of every (url, caption), in order."""
    places = rows.select(["url", "caption"]).append_column("place", pa.array(np.arange(rows.num_rows)))
    first = places.group_by(["url", "caption"]).aggregate([("place", "min")])
    return rows.take(first["place_min"].sort()) if first.num_rows < rows.num_rows else rows


class _Held:
    """Tables in memory."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []
        self._num_rows = self._num_bytes = 0

    def append(self, table: pa.Table) -> None:
        self.tables.append(table)
        self._num_rows += table.num_rows
        self._num_bytes += table.nbytes

    @property
    def is_much(self) -> bool:
        return self._num_rows > MEMORY_ROWS or self._num_bytes > MEMORY_BYTES

    def take(self) -> pa.Table:
        """Return all rows as one table, and release them."""
        table = pa.concat_tables(self.tables)
        self.tables, self._num_rows, self._num_bytes = [], 0, 0
        return table


class _File:
    """Tables in a temporary file."""

    def __init__(self) -> None:
        self._file = TemporaryFile(prefix="imagerag-")  # noqa: SIM115 - it is closed with this object

    def write(self, table: pa.Table) -> int:
        """Append a table to the file, and return its position."""
        place = self._file.seek(0, os.SEEK_END)
        with pa.ipc.new_stream(pa.PythonFile(self._file, "w"), table.schema, options=_OPTIONS) as writer:
            writer.write_table(table)
        return place

    def read(self, place: int) -> pa.Table:
        self._file.seek(place)
        return pa.ipc.open_stream(pa.PythonFile(self._file, "r")).read_all()
