"""Vector search in a table version: the record of its index build, and the query that uses it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, isqrt
from typing import Any

import numpy as np
import pyarrow as pa
from lance import LanceDataset

from imagerag.retrieval.schema import Embeds

_RECORD_KEY = "imagerag.index"
_MARGIN = 2.33
"""Quantile (0.99) of the normal distribution: margin for the ranks of neighbours that meet a condition."""
_REFINE_FACTOR = 2
"""Candidates per requested neighbour, which are re-ranked by their unquantised vectors."""


@dataclass(frozen=True, kw_only=True)
class IndexRecord:
    """Record of the last index build, stored in the table version that it describes."""

    version: int
    """The version that contains this record. In any later version, the record is out of date."""
    kind: str
    """`exact`, or LanceDB's index type."""
    num_rows: int
    num_trained_rows: int
    """Number of rows when the partitions were trained; 0 for `exact`."""
    nprobes: dict[str, dict[str, int]]
    """Number of partitions to probe, by column and number of requested neighbours; empty for `exact`."""
    recall_at_10: float
    recalls: dict[str, float] = field(default_factory=dict)
    """Measured recalls, by name of the measurement; empty for `exact`."""
    num_new_rows: int = 0
    """Number of rows that were added since the recalls were measured."""
    num_unindexed_rows: int
    rows: str = ""
    """Digest of the rows without their features."""
    lacking: dict[str, int] = field(default_factory=dict)
    """Number of rows without cached features, by the features' digest."""
    config: dict[str, Any]
    """The `IndexRules` of the build."""
    words: dict[str, str | bool] = field(default_factory=dict)
    """Settings of the full-text index of captions."""
    segments: dict[str, str] = field(default_factory=dict)
    """Digests of what segments of indexes were built from, by the segments' UUIDs; see `segments.update_segments`."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Fragments that are gone and of which vector indexes have no rows any more, though Lance lists them; by name."""

    def probes(self, column: str, k: int, share: float = 1.0) -> int | None:
        """Return the number of partitions that a search of a column probes; None for an exact search.

        A search is exact if the table has no vector index, or if so few rows meet its condition that a table of them
        would have none.

        Args:
            column: name of a column of embeddings.
            k: number of requested neighbours.
            share: share of the rows that meet the search's condition.
        """
        if column not in self.nprobes or (share < 1 and share * self.num_rows < self.config["exact_below"]):
            return None
        levels, numbers = zip(*((int(level), number) for level, number in self.nprobes[column].items()), strict=True)
        # Of a tenth of the rows, the last of `k` neighbours has the rank `10 k` among all rows on average, not at most.
        wanted = k if share == 1 else (k + _MARGIN * k**0.5) / share
        if wanted > levels[-1]:
            return isqrt(self.num_trained_rows)  # all partitions
        return ceil(float(np.exp(np.interp(np.log(wanted), np.log(levels), np.log(numbers)))) - 1e-6)


def read_record(dataset: LanceDataset) -> IndexRecord | None:
    """Return the record of the last build up to this version, if there is one."""
    record = dataset.config().get(_RECORD_KEY)
    if record is None:
        return None
    values = json.loads(record)
    # Records of early versions are for ten neighbours only.
    nprobes = {name: {"10": own} if isinstance(own, int) else own for name, own in values["nprobes"].items()}
    return IndexRecord(**values | {"nprobes": nprobes})


def write_record(dataset: LanceDataset, record: IndexRecord) -> None:
    """Commit the record as the version after `dataset`."""
    assert record.version == dataset.version + 1, (record.version, dataset.version)
    dataset.update_config({_RECORD_KEY: json.dumps(asdict(record))})


def nearest(
    dataset: LanceDataset,
    column: str,
    embeds: Embeds,
    k: int,
    columns: Sequence[str],
    nprobes: int | None,
    where: str | None = None,
    *,
    is_indexed: bool = False,
    with_row_id: bool = False,
) -> pa.Table:
    """Return the `k` nearest neighbours of each of `embeds` (Q, D) by cosine distance, among rows that meet `where`.

    The search is exact if `nprobes` is None; otherwise it probes that many partitions of the column's index. It uses
    Lance directly: through LanceDB's client, it takes twice as long (6.8 ms instead of 3 ms, 8,000 rows). With
    `is_indexed`, which states that the column's index has all rows, it does not look for others (a fifth of the time).

    Returns:
        `columns`, `_distance`, and `query_index`. The distances are those of the stored vectors, not of the index's
        quantised ones.
    """
    query = {"column": column, "q": embeds if len(embeds) > 1 else embeds[0], "k": k, "metric": "cosine"}
    if nprobes is None:
        query |= {"use_index": False}
    else:
        # Without a maximum, the search continues in further partitions if too few rows in these meet the condition.
        most = nprobes if where is None else None
        query |= {"minimum_nprobes": nprobes, "maximum_nprobes": most, "refine_factor": _REFINE_FACTOR}
    several = ["query_index"] if len(embeds) > 1 else []
    found = dataset.to_table(
        columns=[*several, *columns, "_distance"],
        nearest=query,
        filter=where,
        prefilter=where is not None,
        fast_search=is_indexed and nprobes is not None,
        with_row_id=with_row_id,
    )
    if several:
        return found
    return found.append_column("query_index", pa.array(np.zeros(found.num_rows, np.int32)))
