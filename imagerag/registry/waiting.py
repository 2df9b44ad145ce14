"""Pictures that several threads of a server ask for, made one batch after another by one pipeline."""

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
    """What is asked for would wait for too long: ask again later."""


class WaitingConfig(Config):
    """How much may be asked for at a time, and how much of it is made at a time."""

    batch_size: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Pictures of requests that wait at the same time which are made together. More than 1 is several "
        "times faster, and a picture's last digits then depend on what else was asked for.",
    )
    max_images: int = Field(default=64, ge=1, description="Pictures of one request.")
    max_waiting: int = Field(default=256, ge=1, description="Pictures that may wait; beyond, requests are refused.")
    max_wait_s: float = Field(default=60.0, gt=0, description="Seconds that a request may wait for its first picture.")


@dataclass(eq=False)
class _Job:
    prompt: str
    seed: int
    arguments: dict[str, Any]
    started: bool = False
    result: Generated | Exception | None = None


class Waiting:
    """A pipeline, and the pictures that wait for it.

    There is no thread of its own: whoever waits while nothing is made makes the next batch, of whosoever pictures.
    """

    def __init__(self, pipeline: ImageRAGTurboPipeline, config: WaitingConfig | None = None) -> None:
        self.pipeline, self.config = pipeline, config or WaitingConfig()
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_making = False

    def make(self, wanted: Sequence[tuple[str, int]], arguments: dict[str, Any]) -> list[Generated]:
        """Return the picture of each prompt and seed.

        Args:
            wanted: prompts and seeds.
            arguments: of the pipeline's call.

        Raises:
            UserError: as of the pipeline.
            BusyError: if too many pictures wait, or these have waited for too long.
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
                        self._make_next()
                        continue
                    begun = any(job.started for job in jobs)
                    if not self._changed.wait(None if begun else deadline - time.monotonic()) and not begun:
                        raise BusyError(f"no picture was begun in {self.config.max_wait_s:g} s")
            finally:
                self._jobs = deque(job for job in self._jobs if job not in jobs)  # nobody waits for these any more
        results = [job.result for job in jobs]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return [result for result in results if isinstance(result, Generated)]

    def _make_next(self) -> None:
        """Make the next batch, while others may ask for more."""
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
            self._changed.notify_all()

    def _take(self) -> list[_Job]:
        """Return the job that has waited longest, and others that are made in the same way."""
        alike = (job for job in self._jobs if job.arguments == self._jobs[0].arguments)
        batch = [job for job, _ in zip(alike, range(self.config.batch_size), strict=False)]
        self._jobs = deque(job for job in self._jobs if job not in batch)
        for job in batch:
            job.started = True
        return batch

    def _run(self, batch: list[_Job]) -> None:
        try:
            made = make(self.pipeline, [(job.prompt, job.seed) for job in batch], batch[0].arguments)
        except Exception as error:  # noqa: BLE001 - raised by the call that asked for the picture
            if len(batch) > 1:  # one request's fault is not the others'
                for job in batch:
                    self._run([job])
            else:
                batch[0].result = error
        else:
            for job, picture in zip(batch, made, strict=True):
                job.result = picture
