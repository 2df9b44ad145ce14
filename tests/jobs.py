"""Runs Ray Data jobs in the test's own process: a Ray costs 16 seconds of CPU, each worker that it starts up to 10."""

import pickle
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import torch

from imagerag import workers
from imagerag.workers import Job, WorkersConfig


def use_jobs_here(patch: pytest.MonkeyPatch) -> None:
    """Let `run_job` make workers in this process. Batches, commits, progress and errors stay what they are on Ray."""
    patch.setattr(workers, "start_ray", lambda _: None)
    patch.setattr(workers, "stop_ray", lambda: None)
    patch.setattr(workers, "_store", lambda parts, _: list(parts))
    patch.setattr(workers, "_results", _results)


def _results(job: Job, parts: list[pa.Table], config: WorkersConfig) -> Iterator[dict[str, Any]]:
    """Yield what Ray's workers would; they, too, only have pickled copies of what the driver has."""
    made = pickle.loads(pickle.dumps((job.worker, {**job.arguments, "device": config.device or "cpu"})))
    worker = workers._Actor(made[0], made[1] | {"dtype": config.dtype}, torch.get_num_threads())
    for part in parts:
        for batch in [part] if job.read is None else _batches(job.read(part), job.batch_size):
            yield from worker(batch).to_pylist()


def _batches(tables: Iterator[pa.Table], size: int | None) -> Iterator[pa.Table]:
    rows = pa.concat_tables(tables)
    size = size or rows.num_rows
    yield from (rows.slice(start, size) for start in range(0, rows.num_rows, size))
