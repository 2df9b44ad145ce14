"""A queue in front of one pipeline: threads of a server request pictures, which are generated in batches."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from imagerag.config import Config
from imagerag.errors import UserError
from imagerag.generation.batch import Generated, make
from imagerag.generation.pipeline import ImageRAGTurboPipeline


class BusyError(UserError):
    """Too many pictures wait, or these have waited too long: retry later."""


class WaitingConfig(Config):
    """Limits of requests, and the batch size."""

    batch_size: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Pictures per batch, from all waiting requests. More than 1 is several times faster, but a "
        "picture's last digits then depend on the other requests.",
    )
    batch_wait_s: float = Field(
        default=0.1,
        ge=0,
        description="Maximum time in seconds, from the end of a batch, to wait for its clients' next requests, so that "
        "these share a batch with those that wait already.",
    )
    max_images: int = Field(default=64, ge=1, description="Maximum number of pictures per request.")
    max_waiting: int = Field(
        default=256, ge=1, description="Maximum number of waiting pictures; further requests are refused."
    )
    max_wait_s: float = Field(
        default=60.0, gt=0, description="Maximum time in seconds that a request waits for its first picture."
    )


@dataclass(eq=False)
class _Job:
    prompt: str
    seed: int
    arguments: dict[str, Any]
    started: bool = False
    result: Generated | Exception | None = None


class Waiting:
    """A pipeline with a queue of pictures.

    It has no thread of its own: a waiting thread generates the next batch, including pictures of other threads.
    """

    def __init__(self, pipeline: ImageRAGTurboPipeline, config: WaitingConfig | None = None) -> None:
        self.pipeline, self.config = pipeline, config or WaitingConfig()
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_making = False
        self._expected, self._expected_until = 0, 0.0

    def make(self, wanted: Sequence[tuple[str, int]], arguments: dict[str, Any]) -> list[Generated]:
        """Return a picture for each prompt and seed.

        Args:
            wanted: prompts with seeds.
            arguments: further arguments of the pipeline's call.

        Raises:
            UserError: as the pipeline's call.
            BusyError: if too many pictures wait, or these have waited too long.
        """
        jobs = [_Job(prompt, seed, arguments) for prompt, seed in wanted]
        deadline = time.monotonic() + self.config.max_wait_s
        with self._changed:
            if self._jobs and len(self._jobs) + len(jobs) > self.config.max_waiting:
                raise BusyError(f"{len(self._jobs)} pictures wait already, of at most {self.config.max_waiting}")
            self._jobs.extend(jobs)
            try:
                while any(job.result is None for job in jobs):
                    if not self._is_making:
                        if (remaining := self._time_to_gather()) > 0:
                            self._changed.wait(remaining)
                        else:
                            self._make_next()
                        continue
                    begun = any(job.started for job in jobs)
                    if not self._changed.wait(None if begun else deadline - time.monotonic()) and not begun:
                        raise BusyError(f"no picture was begun in {self.config.max_wait_s:g} s")
            finally:
                self._jobs = deque(job for job in self._jobs if job not in jobs)  # after a timeout, some still wait
        results = [job.result for job in jobs]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return [result for result in results if isinstance(result, Generated)]

    def _time_to_gather(self) -> float:
        """Return the seconds to wait for more pictures; the thread that adds the last of them makes the batch."""
        if len(self._jobs) >= self._expected:
            return 0.0
        return self._expected_until - time.monotonic()

    def _make_next(self) -> None:
        """Generate the next batch with the lock released, so that other threads can add pictures."""
        batch = self._take()
        self._is_making = True
        self._changed.release()
        try:
            self._run(batch)
        finally:
            self._changed.acquire()
            for job in batch:
                job.result = job.result or RuntimeError("the thread that made this picture was stopped")
            self._is_making = False
            self._expected = min(len(batch) + len(self._jobs), self.config.batch_size)
            self._expected_until = time.monotonic() + self.config.batch_wait_s
            self._changed.notify_all()

    def _take(self) -> list[_Job]:
        """Return the oldest job and further jobs with the same arguments, up to the batch size."""
        alike = (job for job in self._jobs if job.arguments == self._jobs[0].arguments)
        batch = [job for job, _ in zip(alike, range(self.config.batch_size), strict=False)]
        self._jobs = deque(job for job in self._jobs if job not in batch)
        for job in batch:
            job.started = True
        return batch

    def _run(self, batch: list[_Job]) -> None:
        try:
            made = make(self.pipeline, [(job.prompt, job.seed) for job in batch], batch[0].arguments)
        except Exception as error:  # noqa: BLE001 - raised in the thread that requested the picture
            if len(batch) > 1:  # one by one, so that one request's error does not fail the others
                for job in batch:
                    self._run([job])
            else:
                batch[0].result = error
        else:
            for job, picture in zip(batch, made, strict=True):
                job.result = picture
