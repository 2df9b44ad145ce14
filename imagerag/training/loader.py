"""The batches of a fine-tuning, which depend on nothing but the seed and their number, read ahead of the steps.

So a training that was killed goes on with the very batches that it would have had, on any number of workers.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch

from imagerag.training.config import FinetuneConfig
from imagerag.training.data import Ints, RagBatch, RagData

_READ_AHEAD = 2


def micro_batches(data: RagData, config: FinetuneConfig, step: int) -> list[Ints]:
    """Return the examples of a step, in the parts that are run at a time.

    Every example is learnt from once before any is for a second time.
    """
    num = len(data.learnt)
    positions = np.arange(step * config.batch_size, (step + 1) * config.batch_size)
    orders = {epoch: _order(config.seed, int(epoch), num) for epoch in np.unique(positions // num)}
    rows = np.array([orders[position // num][position % num] for position in positions])
    return np.split(data.learnt[rows], config.batch_size // config.micro_batch_size)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num: int) -> Ints:
    return np.random.default_rng([seed, epoch]).permutation(num)


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
    """Reads a worker's share of each step's micro-batches while the steps before are run."""

    def __init__(
        self, data: RagData, config: FinetuneConfig, device: torch.device, *, rank: int = 0, num_workers: int = 1
    ) -> None:
        self._data, self._config, self._device = data, config, device
        self._rank, self._num_workers = rank, num_workers

    def steps(self, first: int) -> Iterator[list[Callable[[], Loaded]]]:
        """Yield for each step from `first` on what loads its micro-batches, one after the other."""
        with ThreadPoolExecutor(1, "loader") as pool:
            ahead: deque[list[tuple[int, Ints, Future[RagBatch]]]] = deque()
            for step in range(first, self._config.steps):
                while len(ahead) < _READ_AHEAD and step + len(ahead) < self._config.steps:
                    ahead.append(self._submit(pool, step + len(ahead)))
                yield [partial(self._wait, *part) for part in ahead.popleft()]

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> list[tuple[int, Ints, Future[RagBatch]]]:
        parts = list(enumerate(micro_batches(self._data, self._config, step)))
        return [
            (number, rows, pool.submit(self._read, rows, step, number))
            for number, rows in parts[self._rank :: self._num_workers]
        ]

    def _read(self, rows: Ints, step: int, number: int) -> RagBatch:
        rng = np.random.default_rng([self._config.seed, step, number])
        batch = self._data.read(rows, self._config.references, rng)
        return batch.pin() if self._device.type == "cuda" else batch

    def _wait(self, number: int, examples: Ints, future: "Future[RagBatch]") -> Loaded:
        started = time.perf_counter()
        batch = future.result()
        return Loaded(batch.to(self._device), number, time.perf_counter() - started, examples)
