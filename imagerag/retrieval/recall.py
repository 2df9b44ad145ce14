"""Recall of a table's vector indexes compared with exact search, with the table's own rows as queries.

A neighbour counts as found if its similarity reaches that of the last exact neighbour, so that rows with equal
embeddings are interchangeable (as in ann-benchmarks, https://github.com/erikbern/ann-benchmarks).
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import ceil

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lance import LanceDataset

from imagerag.retrieval.ann import IndexRecord, nearest
from imagerag.retrieval.schema import Embeds
from imagerag.storage.lance_table import literal

K = 10
"""Number of neighbours for which an index must reach its target recall."""
LEVELS = (10, 100, 1_000)
"""Numbers of neighbours for which the number of partitions to probe is measured; others are interpolated."""
_SHOWN = (1, 4, 10, 100)
_FILTER_SHARE = 0.01
_TOLERANCE = 1e-5
_BATCH_ROWS = 8192
_FEWEST_PROBES = 4
_GROWTH = 1.5
_FEWEST_QUERIES = 5
_FILTERED_QUERIES = 50
"""Searches with a condition probe many partitions: of ten million rows, each takes seconds."""

Similarities = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Probe:
    """Queries against one column, and the similarities of the exact nearest rows."""

    column: str
    embeds: Embeds
    """(Q, D), L2-normalised."""
    is_own: bool
    """Whether the queries are rows of the column: each finds itself first, which does not count."""
    similarities: Similarities
    """Similarities (Q, N) of the nearest rows, nearest first."""
    where: str | None
    """A SQL condition that few rows meet."""
    share: float
    """Share of the rows that meet the condition `where`."""
    among: Similarities
    """Similarities (Q, M) of the nearest rows that meet the condition, nearest first; empty if `is_own`."""
    known: dict[tuple[int, int | None], float] = field(default_factory=dict, compare=False)
    """Recalls without a condition that were measured already, by number of neighbours and of partitions."""

    def recall(self, dataset: LanceDataset, k: int, nprobes: int | None, where: str | None = None) -> float:
        """Return the share of the `k` nearest neighbours that the index finds with `nprobes`; 1 if there are none.

        For a larger `k`, fewer queries are made, because the precision depends on the total number of neighbours.
        """
        if where is not None:
            return self._recall(dataset, k, nprobes, self.among, where)
        if (k, nprobes) not in self.known:
            self.known[k, nprobes] = self._recall(dataset, k, nprobes, self.similarities)
        return self.known[k, nprobes]

    def _recall(
        self, dataset: LanceDataset, k: int, nprobes: int | None, exact: Similarities, where: str | None = None
    ) -> float:
        own = int(self.is_own)
        k = min(k, exact.shape[1] - own)
        if k < 1:
            return 1.0
        most = len(exact) if where is None else _FILTERED_QUERIES
        step = max(1, len(exact) // max(_FEWEST_QUERIES, most * K // max(k, K)))
        embeds, thresholds = self.embeds[::step], exact[::step, k + own - 1]
        found = nearest(dataset, self.column, embeds, k + own, [], nprobes, where)
        reached = 1 - found["_distance"].to_numpy() >= thresholds[found["query_index"].to_numpy()] - _TOLERANCE
        return float((reached.sum() - len(embeds) * own) / (len(embeds) * k))


def make_probes(dataset: LanceDataset, num_queries: int) -> list[Probe]:
    """Sample rows as queries and find their exact neighbours.

    Captions are searched among captions, and images among images. Since prompts differ from the captions that the index
    was trained on, captions are also searched among images, and midpoints of two captions among captions. Reads every
    embedding once.
    """
    num_rows = dataset.count_rows()
    assert num_rows > max(num_queries, K), num_rows
    offsets = np.sort(np.random.default_rng(0).choice(num_rows, num_queries, replace=False))
    rows = dataset.take(offsets, columns=["id", "text_embed", "image_embed"])
    text, image = to_numpy(rows["text_embed"]), to_numpy(rows["image_embed"])
    between = text + np.roll(text, 1, axis=0)
    between /= np.maximum(np.linalg.norm(between, axis=1, keepdims=True), 1e-6)
    queries = [("text_embed", text, True), ("text_embed", between, False)]
    queries += [("image_embed", image, True), ("image_embed", text, False)]
    last = rows["id"].sort()[max(0, int(num_queries * _FILTER_SHARE) - 1)].as_py()  # ids are evenly distributed
    most = min(max(LEVELS) + 1, num_rows)
    nearest_of = [_Nearest(most, num_queries) for _ in queries]
    nearest_among = [_Nearest(K, num_queries) for _ in queries]
    num_among = 0
    for batch in dataset.to_batches(columns=["id", "text_embed", "image_embed"], batch_size=_BATCH_ROWS):
        meets = pc.less_equal(batch["id"], last).to_numpy(zero_copy_only=False)
        num_among += int(meets.sum())
        for i, (column, embeds, is_own) in enumerate(queries):
            similarities = to_numpy(batch[column]) @ embeds.T
            nearest_of[i].add(similarities)
            if not is_own:
                nearest_among[i].add(similarities[meets])
    return [
        Probe(
            column=column,
            embeds=embeds,
            is_own=is_own,
            similarities=nearest_of[i].sorted(),
            where=f"id <= {literal(last)}",
            share=num_among / num_rows,
            among=nearest_among[i].sorted(),
        )
        for i, (column, embeds, is_own) in enumerate(queries)
    ]


class _Nearest:
    """The similarities (N, Q) of the nearest rows so far."""

    def __init__(self, most: int, num_queries: int) -> None:
        self._most, self._best = most, np.empty((0, num_queries), np.float32)

    def add(self, similarities: Similarities) -> None:
        """Add the similarities (R, Q) of further rows."""
        if len(self._best) == self._most:  # of many rows, few are among the nearest of any query
            similarities = similarities[(similarities > self._best.min(0)).any(1)]
        best = np.concatenate([self._best, similarities])
        self._best = best if len(best) <= self._most else np.partition(best, -self._most, axis=0)[-self._most :]

    def sorted(self) -> Similarities:
        """Return the similarities by query (Q, N), nearest first."""
        return np.ascontiguousarray(np.sort(self._best, axis=0)[::-1].T)


def fewest_probes(
    dataset: LanceDataset,
    probes: Sequence[Probe],
    num_partitions: int,
    target: float,
    known: Mapping[str, Mapping[str, int]],
) -> dict[str, dict[str, int]]:
    """Return the number of partitions to probe in a search of each column to reach the target, for each of `LEVELS`.

    A column's worst probe decides. If not even all partitions reach the target, all are used. Recall grows with the
    number of partitions and shrinks with that of neighbours, so a binary search tries only few numbers. `known` are the
    numbers that reached the target in the same partitions before rows were added; smaller numbers are not tried.
    """
    numbers = [min(_FEWEST_PROBES, num_partitions)]
    while numbers[-1] < num_partitions:
        numbers.append(min(ceil(_GROWTH * numbers[-1]), num_partitions))
    nprobes: dict[str, dict[str, int]] = {}
    for column in dict.fromkeys(probe.column for probe in probes):
        own = [probe for probe in probes if probe.column == column]
        nprobes[column], fewest = {}, 1
        for level in LEVELS:

            @cache
            def recall(number: int, own: tuple[Probe, ...] = tuple(own), level: int = level) -> float:
                return min(probe.recall(dataset, level, number) for probe in own)

            number = max(fewest, known.get(column, {}).get(str(level), 0))
            if number == 1 or recall(number) < target:
                more = [each for each in numbers if each > number] or numbers[-1:]
                number = more[min(bisect_left(more, target, key=recall), len(more) - 1)]
            nprobes[column][str(level)] = fewest = number
    return nprobes


def measure(dataset: LanceDataset, probes: Sequence[Probe], record: IndexRecord) -> dict[str, float]:
    """Return the worst recall of searches with a record's numbers of partitions, by number of requested neighbours.

    The last entry is for `K` neighbours among the rows that meet a condition.
    """
    found = {
        f"recall@{k}": min(probe.recall(dataset, k, record.probes(probe.column, k)) for probe in probes) for k in _SHOWN
    }
    others = [probe for probe in probes if not probe.is_own]
    share = others[0].share
    found[f"recall@{K} among {share:.1%}"] = min(
        probe.recall(dataset, K, record.probes(probe.column, K, share), probe.where) for probe in others
    )
    return found


def to_numpy(column: pa.FixedSizeListArray | pa.ChunkedArray) -> Embeds:
    """Return a column of embeddings as (N, D), without a copy if it has one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values: Embeds = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), column.type.list_size)
