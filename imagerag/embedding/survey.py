"""Comparison of a table with its corpus: finds missing and stale rows, in memory that does not grow with them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from imagerag.retrieval.schema import row_ids
from imagerag.retrieval.store import Store
from imagerag.storage.hexadecimal import ID, SHA256, column_from_hex
from imagerag.storage.lance_table import batches_of
from imagerag.storage.spool import MEMORY_ROWS, Parts, aligned, by_id

_COMPARED = ["id", "url", "source", "licence"]
"""Columns by which a row of the table is compared with the corpus."""
_SHARDS_OF_A_PART = 16


@dataclass(frozen=True)
class Survey:
    """Differences between a table and its corpus."""

    missing: Parts
    """Rows that the table lacks, or has with other values."""
    num_missing: int
    stale: pa.ChunkedArray
    """Ids of the table's rows to remove."""
    num_wanted: int
    """Number of rows that the corpus should have in the table."""
    num_images: int
    """Number of images of the corpus, with repetitions of an image and caption, which make only one row."""

    def shards(self) -> Iterator[pa.Table]:
        """Yield the missing rows shard by shard, in order."""
        for part in self.missing:
            rows = part.sort_by([("shard", "ascending"), ("row", "ascending")]).drop_columns("row")
            starts = np.flatnonzero(np.diff(rows["shard"].to_numpy(), prepend=-1)).tolist()
            ends = [*starts[1:], len(rows)]
            yield from (rows.slice(start, end - start) for start, end in zip(starts, ends, strict=True))


def survey(images: Iterable[pa.Table], store: Store) -> Survey:
    """Compare the newest version of a table with the images of its corpus, which `ledger.iter_images` yields."""
    table = store.dataset()
    wanted = Parts(map(with_ids, images), by_id)
    present = Parts(batches_of(table, _COMPARED, MEMORY_ROWS), by_id)
    stale, counts = [], np.zeros(2, np.int64)

    def missing() -> Iterator[pa.Table]:
        for rows, own in aligned(wanted, present):
            own = table.schema.empty_table().select(_COMPARED) if own is None else own
            if rows is None:
                stale.append(own["id"])
                continue
            unique = first_rows(rows)
            lacking, gone = compare(unique, own)
            stale.append(gone)
            counts[:] += len(unique), len(rows)
            yield lacking

    lacking = Parts(missing(), lambda rows: rows["shard"].to_numpy() // _SHARDS_OF_A_PART)
    ids = pa.chunked_array([chunk for each in stale for chunk in each.chunks], ID)
    return Survey(lacking, lacking.num_rows, ids, int(counts[0]), int(counts[1]))


def with_ids(images: pa.Table) -> pa.Table:
    """Return images with `id` and `image_sha256` of the table's rows. Unknown sources and licences become empty."""
    rows = images.append_column("id", row_ids(images["sha256"], images["caption"]))
    rows = rows.append_column("image_sha256", column_from_hex(images["sha256"], SHA256)).drop_columns("sha256")
    for name in ("source", "licence"):
        rows = rows.set_column(rows.column_names.index(name), name, rows[name].fill_null(""))
    return rows


def first_rows(rows: pa.Table) -> pa.Table:
    """Return the first row, by `row`, of each image and caption."""
    first = rows.select(["id", "row"]).group_by("id").aggregate([("row", "min")])["row_min"]
    return rows if len(first) == len(rows) else _chosen(rows, first)


def compare(wanted: pa.Table, present: pa.Table) -> tuple[pa.Table, pa.ChunkedArray]:
    """Return the rows of `wanted` that are missing or different in `present`, and the ids of `present` to remove."""
    missing = wanted.select([*_COMPARED, "row"]).join(present, _COMPARED, join_type="left anti")["row"]
    stale = present.join(wanted.select(_COMPARED), _COMPARED, join_type="left anti")["id"]
    return _chosen(wanted, missing), stale


def _chosen(rows: pa.Table, numbers: pa.ChunkedArray) -> pa.Table:
    return rows.filter(pa.array(np.isin(rows["row"].to_numpy(), numbers.to_numpy())))
