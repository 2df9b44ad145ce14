"""Recall of a table's vector indexes compared with exact search, with the table's own rows as queries.

A neighbour counts as found when its similarity reaches that of the tenth exact neighbour, so that rows with equal
embeddings can stand in for each other (as in ann-benchmarks, https://github.com/erikbern/ann-benchmarks).
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lance import LanceDataset

from imagerag.retrieval.ann import nearest
from imagerag.retrieval.schema import Embeds

K = 10
_TOLERANCE = 1e-5
_BATCH_ROWS = 8192
_FEWEST_PROBES = 4
_GROWTH = 1.5


@dataclass(frozen=True)
class Probe:
    """Queries against one column, and the similarity that a neighbour of each must reach."""

    column: str
    embeds: Embeds
    """(Q, D), L2-normalised."""
    k: int
    """`K`, plus one where a query is itself a row of the column: that row is found first and does not count."""
    thresholds: npt.NDArray[np.float32]
    """(Q,): the similarity of the last exact neighbour."""

    def recall(self, dataset: LanceDataset, nprobes: int) -> float:
        """Return the share of the `K` nearest neighbours that the index finds with `nprobes`."""
        found = nearest(dataset, self.column, self.embeds, self.k, [], nprobes)
        reached = 1 - found["_distance"].to_numpy() >= self.thresholds[found["query_index"].to_numpy()] - _TOLERANCE
        num_queries = len(self.embeds)
        return float((reached.sum() - num_queries * (self.k - K)) / (num_queries * K))


def make_probes(dataset: LanceDataset, num_queries: int) -> list[Probe]:
    """Sample rows as queries and find their exact neighbours.

    Captions are searched among captions, and images among images. Since prompts differ from the captions that the index
    was trained on, captions are also searched among images, and midpoints of two captions among captions. Reads every
    embedding once.
    """
    num_rows = dataset.count_rows()
    assert num_rows > max(num_queries, K), num_rows
    offsets = np.sort(np.random.default_rng(0).choice(num_rows, num_queries, replace=False))
    rows = dataset.take(offsets, columns=["text_embed", "image_embed"])
    text, image = to_numpy(rows["text_embed"]), to_numpy(rows["image_embed"])
    between = text + np.roll(text, 1, axis=0)
    between /= np.maximum(np.linalg.norm(between, axis=1, keepdims=True), 1e-6)
    queries = [("text_embed", text, K + 1), ("text_embed", between, K)]
    queries += [("image_embed", image, K + 1), ("image_embed", text, K)]
    # Similarities of the nearest rows so far: for each probe (k, Q).
    best = [np.full((k, num_queries), -2, np.float32) for _, _, k in queries]
    for batch in dataset.to_batches(columns=["text_embed", "image_embed"], batch_size=_BATCH_ROWS):
        for i, (column, embeds, k) in enumerate(queries):
            similarities = np.concatenate([best[i], to_numpy(batch[column]) @ embeds.T])
            best[i] = np.partition(similarities, -k, axis=0)[-k:]
    return [Probe(column, embeds, k, best[i].min(axis=0)) for i, (column, embeds, k) in enumerate(queries)]


def fewest_probes(
    dataset: LanceDataset, probes: Sequence[Probe], num_partitions: int, target: float, known: Mapping[str, int]
) -> tuple[dict[str, int], float]:
    """Return how many partitions a search by each column must look into to reach the target, and the worst recall.

    A column's worst probe decides. Where even all partitions do not reach the target, they are the answer. Recall grows
    with the partitions, so few of the numbers in question have to be tried; of these partitions before they were given
    more rows it is `known` how many reached the target, and no fewer are tried.
    """
    numbers = [min(_FEWEST_PROBES, num_partitions)]
    while numbers[-1] < num_partitions:
        numbers.append(min(ceil(_GROWTH * numbers[-1]), num_partitions))
    nprobes: dict[str, int] = {}
    worst = 1.0
    for column in dict.fromkeys(probe.column for probe in probes):
        own = [probe for probe in probes if probe.column == column]

        @cache
        def recall(number: int, own: tuple[Probe, ...] = tuple(own)) -> float:
            return min(probe.recall(dataset, number) for probe in own)

        number = known.get(column, 0)
        if number == 0 or recall(number) < target:
            more = [each for each in numbers if each > number] or numbers[-1:]
            number = more[min(bisect_left(more, target, key=recall), len(more) - 1)]
        nprobes[column] = number
        worst = min(worst, recall(number))
    return nprobes, worst


def to_numpy(column: pa.FixedSizeListArray | pa.ChunkedArray) -> Embeds:
    """Return a column of embeddings as (N, D), without a copy if it has one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values: Embeds = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), column.type.list_size)
