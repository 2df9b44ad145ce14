"""The batches of a fine-tuning, which depend on nothing but the seed and their number, read ahead of the steps.

So a training that was killed goes on with the very batches that it would have had, on any number of workers.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch

from imagerag.training.config import FinetuneConfig
from imagerag.training.data import Ints, RagBatch, RagData

_READ_AHEAD = 2
"""Micro-batches read while one is run: not steps, of which one may be too large for the host's memory."""


def micro_batch(data: RagData, config: FinetuneConfig, step: int, number: int) -> Ints:
    """Return the examples (B,) of one of a step's micro-batches.

    Every example is learnt from once before any is for a second time.
    """
    num = len(data.learnt)
    first = step * config.batch_size + number * config.micro_batch_size
    positions = np.arange(first, first + config.micro_batch_size)
    orders = {epoch: _order(config.seed, int(epoch), num) for epoch in np.unique(positions // num)}
    rows = np.array([orders[position // num][position % num] for position in positions])
    examples: Ints = data.learnt[rows]
    return examples


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num: int) -> Ints:
    return np.random.default_rng([seed, epoch]).permutation(num).astype(np.int32)


@dataclass(frozen=True)
class Loaded:
    """A micro-batch and how long the step waited for it."""

    batch: RagBatch
    number: int
    """Of the micro-batch within its step, over all workers."""
    waited_s: float
    examples: Ints
    """Which ones (B,) it has."""


class Loader:
    """Reads a worker's share of each step's micro-batches, the next ones while one is run."""

    def __init__(
        self, data: RagData, config: FinetuneConfig, device: torch.device, *, rank: int = 0, num_workers: int = 1
    ) -> None:
        self._data, self._config, self._device = data, config, device
        self._share = range(rank, config.batch_size // config.micro_batch_size, num_workers)
        self._pool = ThreadPoolExecutor(1, "loader")
        self._reading: dict[int, Future[tuple[Ints, RagBatch]]] = {}
        """What is read ahead, by its place among the worker's micro-batches of all steps."""

    def steps(self, first: int) -> Iterator[list[Callable[[], Loaded]]]:
        """Yield for each step from `first` on what loads its micro-batches, one after the other."""
        size = len(self._share)
        for step in range(first, self._config.steps):
            yield [partial(self._load, place) for place in range(step * size, (step + 1) * size)]

    def _load(self, place: int) -> Loaded:
        """Return a micro-batch, of which nothing is kept, and have those after it read."""
        started = time.perf_counter()
        examples, batch = (self._reading.pop(place, None) or self._submit(place)).result()
        after = range(place + 1, min(place + 1 + _READ_AHEAD, self._config.steps * len(self._share)))
        self._reading = {each: self._reading.get(each) or self._submit(each) for each in after}
        number = self._share[place % len(self._share)]
        return Loaded(batch.to(self._device), number, time.perf_counter() - started, examples)

    def _submit(self, place: int) -> "Future[tuple[Ints, RagBatch]]":
        step, index = divmod(place, len(self._share))
        return self._pool.submit(self._read, step, self._share[index])

    def _read(self, step: int, number: int) -> tuple[Ints, RagBatch]:
        examples = micro_batch(self._data, self._config, step, number)
        rng = np.random.default_rng([self._config.seed, step, number])
        batch = self._data.read(examples, self._config.references, rng)
        return examples, batch.pin() if self._device.type == "cuda" else batch
