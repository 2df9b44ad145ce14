"""The blocklist of a table: what was taken down and must not come back, however often its URL list is ingested."""

from datetime import UTC, datetime
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from lance import LanceDataset

from imagerag.retrieval.store import Store
from imagerag.storage.hexadecimal import ID
from imagerag.storage.lance_table import LanceTable, fragments_with_deleted, rows_with, values_of

Column = Literal["id", "url", "image_sha256"]

_COLUMNS: list[Column] = ["id", "url", "image_sha256"]

_SCHEMA = pa.schema(
    [
        pa.field("column", pa.string(), nullable=False),
        pa.field("value", pa.string(), nullable=False),  # ids and hashes in hexadecimal digits
        pa.field("blocked_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)


def block(store: Store, column: Column, values: list[str]) -> None:
    """Block values: from now on, no row of the table may have them in `column`. Repeating it has no effect."""
    new = sorted(set(values) - set(blocked(store, column)))
    if not new:
        return
    now = datetime.now(UTC)
    rows = pa.table({"column": [column] * len(new), "value": new, "blocked_at": [now] * len(new)}, schema=_SCHEMA)
    _list_of(store).append(rows)


def blocked(store: Store, column: Column) -> list[str]:
    """Return the blocked values of `column`."""
    rows = _list_of(store).find()
    if rows is None:
        return []
    values: list[str] = rows.to_table(columns=["value"], filter=f"column = '{column}'")["value"].to_pylist()
    return values


def count_blocked(store: Store, dataset: LanceDataset) -> int:
    """Return the number of rows of a version that are blocked."""
    found = [rows_with(dataset, column, blocked(store, column), ["id"])["id"] for column in _COLUMNS]
    return len(pc.unique(pa.chunked_array([chunk for ids in found for chunk in ids.chunks], ID)))


def fragments_with_blocked(store: Store) -> list[int]:
    """Return those fragments of the newest version whose files contain a deleted row that is blocked.

    Rows that are not deleted are not looked at: the caller has deleted those that are blocked.
    """
    return fragments_with_deleted(store.dataset(), {column: blocked(store, column) for column in _COLUMNS})


def matches(rows: pa.Table, column: Column, values: list[str]) -> pa.ChunkedArray:
    """Return which rows have one of the values in `column`."""
    return pc.is_in(rows[column], values_of(rows[column].type, values))


def _list_of(store: Store) -> LanceTable:
    # The dot distinguishes the name from those of corpora.
    return LanceTable(store.uri, f"{store.name}.blocked")
