"""Latency of a pipeline by part."""

import time
from collections import defaultdict
from typing import Any

import torch

from imagerag.generation.pipeline import ImageRAGTurboPipeline


class TimedPipeline:
    """Wraps a pipeline and accumulates the seconds of its parts; the rest of a call is almost entirely text encoding.

    Attributes:
        pipeline: the wrapped pipeline; its hooks stay.
        seconds: seconds of `retrieval`, `denoising` and `decoding`, accumulated until the caller clears them.
    """

    def __init__(self, pipeline: ImageRAGTurboPipeline) -> None:
        self.pipeline, self.seconds = pipeline, defaultdict[str, float](float)
        self._started: dict[str, float] = {}
        for part, module in (("denoising", pipeline.unet), ("decoding", pipeline.vae.decoder)):
            module.register_forward_pre_hook(lambda *_, part=part: self._start(part))
            module.register_forward_hook(lambda *_, part=part: self._stop(part))
        find = pipeline._find_references

        def find_references(*arguments: Any) -> Any:
            # Where cached features are missing, retrieval runs the UNet: that time is not denoising.
            before = dict(self.seconds)
            self._start("retrieval")
            found = find(*arguments)
            self._stop("retrieval")
            self.seconds |= {part: before.get(part, 0.0) for part in ("denoising", "decoding")}
            return found

        pipeline._find_references = find_references  # type: ignore[assignment, method-assign]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the pipeline."""
        return self.pipeline(*arguments, **named)

    def _start(self, part: str) -> None:
        self._wait()
        self._started[part] = time.perf_counter()

    def _stop(self, part: str) -> None:
        self._wait()
        self.seconds[part] += time.perf_counter() - self._started[part]

    def _wait(self) -> None:
        if self.pipeline._execution_device.type == "cuda":
            torch.cuda.synchronize()
