"""How vectors of a table version are searched: the record that its index left, and the query that honours it."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from lance import LanceDataset
from lancedb.query import LanceVectorQueryBuilder
from lancedb.table import Table

Embeds = npt.NDArray[np.float32]

_RECORD_KEY = "imagerag.index"
_REFINE_FACTOR = 2
"""Candidates fetched for each neighbour wanted, to be ranked again by their unquantised vectors."""


@dataclass(frozen=True, kw_only=True)
class IndexRecord:
    """What the last index build did. It is part of the table version that it describes."""

    version: int
    """The version that holds this record. On any later version the record is out of date."""
    kind: str
    """`exact` or LanceDB's index type."""
    num_rows: int
    num_trained_rows: int
    """Rows when the partitions were trained; 0 for `exact`."""
    nprobes: dict[str, int]
    """Partitions that a search by a column looks into; nothing for `exact`."""
    recall_at_10: float
    num_unindexed_rows: int
    config: dict[str, Any]
    """The `IndexConfig` that it was built with."""


def read_record(dataset: LanceDataset) -> IndexRecord | None:
    """Return the record of the last build before or at this version."""
    record = dataset.config().get(_RECORD_KEY)
    return None if record is None else IndexRecord(**json.loads(record))


def write_record(dataset: LanceDataset, record: IndexRecord) -> None:
    """Commit the record as the version after `dataset`."""
    assert record.version == dataset.version + 1, (record.version, dataset.version)
    dataset.update_config({_RECORD_KEY: json.dumps(asdict(record))})


def nearest(
    table: Table, column: str, embeds: Embeds, nprobes: int | None, where: str | None = None
) -> LanceVectorQueryBuilder:
    """Return a query for the neighbours of `embeds` (Q, D) by cosine distance, among the rows of a condition.

    The distances that it finds are those of the stored vectors, not of the index's quantised ones.
    """
    query = table.search(embeds, vector_column_name=column).distance_type("cosine")
    if nprobes is not None:
        query = query.nprobes(nprobes).refine_factor(_REFINE_FACTOR)
    if where is not None:
        # Without a maximum, the search goes on to further partitions where too few rows in these meet the condition.
        query = query.where(where, prefilter=True).maximum_nprobes(0)
    return query
