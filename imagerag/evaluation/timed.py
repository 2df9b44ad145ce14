"""The pipeline with a stopwatch: how long its parts take."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from imagerag.generation.pipeline import ImageRAGTurboPipeline


class TimedPipeline(ImageRAGTurboPipeline):
    """Adds up the seconds of its parts; what is left of a call is text encoding, next to all of it."""

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of `retrieval`, `denoising` and `decoding` since it was cleared."""
        return defaultdict(float)

    def _find_references(self, *arguments: Any) -> Any:
        with self._timed("retrieval"):
            return super()._find_references(*arguments)

    def _sample(self, *arguments: Any) -> Any:
        with self._timed("denoising"):
            return super()._sample(*arguments)

    def _decode(self, *arguments: Any) -> Any:
        with self._timed("decoding"):
            return super()._decode(*arguments)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[part] += time.perf_counter() - started

    def _wait(self) -> None:
        if self._execution_device.type == "cuda":
            torch.cuda.synchronize()
