"""Ray Data jobs that map a model over rows: configuration, placement, commits in groups, and detection of stalls."""

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import pyarrow as pa
from pydantic import Field

from imagerag.compute import start_ray, stop_ray
from imagerag.config import Config
from imagerag.errors import UserError
from imagerag.settings import Settings

T = TypeVar("T")
Dtype = Literal["fp32", "bf16", "fp16"]

_WORKER_CORES = 8
_BLOCK_BYTES = 16 * 2**20
_IN_FLIGHT_BYTES = 128 * 2**20
"""Limit of what was read and is queued, per worker, which bounds memory."""
_RESULT = pa.schema({"written": pa.list_(pa.string()), "num_rows": pa.int64(), "machine_s": pa.float64()})

Worker = Callable[[pa.Table], tuple[list[str], int]]
"""Processes rows; returns what `commit` needs to add what it wrote, and the number of rows that it did."""


class StalledError(RuntimeError):
    """No worker finished a batch within the timeout."""


class WorkersConfig(Config):
    """How a job uses its machines. Unset values are chosen from the resources of the Ray cluster."""

    device: Literal["cpu", "cuda"] | None = Field(
        default=None, description="Device that models run on; unset: GPUs if there are any, else CPUs."
    )
    dtype: Dtype | None = Field(default=None, description="Dtype of the models; unset: fp32 on CPUs, fp16 on GPUs.")
    num_workers: int | None = Field(
        default=None, ge=1, description="Workers, each with a model; unset: one per GPU, or one per 8 CPU cores."
    )
    stall_timeout_s: float = Field(
        default=1800.0, gt=0, description="The job fails when no batch is finished for this many seconds."
    )


class CommittingConfig(WorkersConfig):
    """Workers of a job whose driver commits what they wrote."""

    commit_every_s: float = Field(
        default=60.0, ge=0, description="Seconds between commits; a killed job loses its uncommitted work."
    )


def plan_workers(nodes: list[dict[str, Any]], config: WorkersConfig) -> tuple[str, int, int]:
    """Return the device, the number of workers and the threads per worker.

    Raises:
        UserError: if `num_workers` is larger than the number of GPUs or cores.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    num_gpus = int(sum(resources.get("GPU", 0) for resources in alive))
    cores = [int(resources["CPU"]) for resources in alive if resources.get("CPU")]
    device = config.device or ("cuda" if num_gpus else "cpu")
    asked = config.num_workers or 1
    unit, most = ("GPU", num_gpus) if device == "cuda" else ("core", sum(cores))
    if asked > most:
        raise UserError(f"every worker needs a {unit} of its own: Ray has {most}, and {asked} workers are asked for")
    num_threads = min(_WORKER_CORES, *cores, max(1, sum(cores) // asked))
    num_workers = num_gpus if device == "cuda" else sum(n // num_threads for n in cores)
    return device, config.num_workers or num_workers, num_threads


@dataclass(frozen=True, kw_only=True)
class Job:
    """A Ray Data job: what its workers do, and what the driver does with their results."""

    parts: Iterable[pa.Table]
    """What is distributed. They are read once, and kept in Ray's memory, which spills to disk: they may be larger than
    the driver's. A worker that dies loses only its current part, or batch."""
    worker: Callable[..., Worker]
    """Makes a worker in its own process, from `arguments`, `device` and `dtype`."""
    arguments: Mapping[str, Any]
    read: Callable[[pa.Table], Iterator[pa.Table]] | None = None
    """Reads tables from a part, in a task beside the workers; by default, workers get the parts themselves."""
    batch_size: int | None = None
    """Rows of what `read` yields that a worker gets at a time."""
    num_rows: int
    """Rows that all workers do together."""
    commit: Callable[[list[str]], object]
    """Adds what workers wrote: in groups, because each version of a table lists all of its fragments."""
    commit_every_s: float = 0.0
    """Seconds between commits; 0 commits each result."""
    on_done: Callable[[int], None]
    """Called with the number of rows done, after each result."""


def run_job(job: Job, config: WorkersConfig, settings: Settings) -> float:
    """Run a job on Ray, and return the machine-seconds of its workers, including the loading of their models.

    Raises:
        UserError: if there are fewer GPUs or cores than `config` requests.
        StalledError: if no batch is finished within the timeout.
    """
    start_ray(settings)
    try:
        parts = _store(job.parts, config)  # before `follow`, which would count the time as that of a batch
        return follow(job, partial(_results, job, parts, config), config.stall_timeout_s)
    except BaseException:
        # A failed Ray Data job keeps its workers, and so the cores that a retry needs.
        stop_ray()
        raise


def follow(job: Job, iterate: Callable[[], Iterable[Mapping[str, Any]]], timeout_s: float) -> float:
    """Commit and report the results that `iterate()` yields, and return their machine-seconds; see `watched`."""
    written: list[str] = []
    num_done, machine_s, last = 0, 0.0, time.monotonic()
    with closing(watched(iterate, timeout_s)) as results:
        for result in results:
            written += result["written"]
            if written and time.monotonic() - last >= job.commit_every_s:
                job.commit(written)
                written, last = [], time.monotonic()
            num_done += result["num_rows"]
            machine_s += result["machine_s"]
            job.on_done(num_done)
    if written:
        job.commit(written)
    assert num_done == job.num_rows, f"{num_done} rows were done instead of {job.num_rows}"
    return machine_s


class _Actor:
    """Ray actor that holds a worker and measures its time."""

    def __init__(self, worker: Callable[..., Worker], arguments: Mapping[str, Any], num_threads: int) -> None:
        import torch

        started = time.perf_counter()
        torch.set_num_threads(num_threads)  # Ray sets 1
        self._worker = worker(**arguments)
        self._unreported_s = time.perf_counter() - started

    def __call__(self, rows: pa.Table) -> pa.Table:
        started = time.perf_counter()
        written, num_rows = self._worker(rows)
        machine_s, self._unreported_s = self._unreported_s + time.perf_counter() - started, 0.0
        return pa.table({"written": [written], "num_rows": [num_rows], "machine_s": [machine_s]}, schema=_RESULT)


def _store(parts: Iterable[pa.Table], config: WorkersConfig) -> list[Any]:
    """Return references to tables in Ray's memory; of the tables themselves, this process keeps none."""
    import ray

    plan_workers(ray.nodes(), config)  # which may refuse `config`, before anything is read
    return [ray.put(part) for part in parts]


def _results(job: Job, parts: list[Any], config: WorkersConfig) -> Iterator[dict[str, Any]]:
    """Yield a row of `_RESULT` for each batch, in order of completion; `parts` are the job's, as `_store` returns."""
    import ray
    from ray.data import ActorPoolStrategy, ExecutionResources, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs every plan and every finished execution
    device, num_workers, num_threads = plan_workers(ray.nodes(), config)
    dataset = ray.data.from_arrow_refs(parts)
    dataset.context.enable_progress_bars = False
    dataset.context.raise_original_map_exception = True
    if job.read is None:
        num_workers = min(num_workers, len(parts))
    else:
        dataset.context.target_max_block_size = _BLOCK_BYTES
        dataset.context.execution_options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=_IN_FLIGHT_BYTES * num_workers
        )
        dataset = dataset.map_batches(
            job.read,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,  # readers need little CPU, and the workers may reserve all cores
            # One reader outpaces a model on CPU cores, and each is a process of 150 MB.
            compute=TaskPoolStrategy(size=num_workers if device == "cpu" else 2 * num_workers),
        )
    resources = {"num_gpus": 1} if device == "cuda" else {"num_cpus": num_threads}
    results = dataset.map_batches(
        _Actor,
        fn_constructor_args=(job.worker, {**job.arguments, "device": device, "dtype": config.dtype}, num_threads),
        batch_size=job.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=num_workers),
        **resources,
    )
    yield from results.iter_rows()


def watched(iterate: Callable[[], Iterable[T]], timeout_s: float) -> Generator[T, None, None]:
    """Yield the items of `iterate()`, which runs in a separate thread.

    Ray was seen to wait forever for a lost node. The thread can't be interrupted, but it can be abandoned.

    Raises:
        StalledError: if there is no new item for `timeout_s` seconds.
    """
    results: queue.Queue[T | BaseException | None] = queue.Queue()
    stopped = threading.Event()

    def run() -> None:
        end: BaseException | None = None
        try:
            for result in iterate():
                results.put(result)
                if stopped.is_set():
                    break
        except BaseException as error:  # noqa: BLE001 - it is raised in the consuming thread
            end = cause_of(error)
        results.put(end)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (result := results.get(timeout=timeout_s)) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result
    except queue.Empty:
        raise StalledError(
            f"no batch was finished for {timeout_s:.0f} s. What was committed is kept: run the same again to continue"
        ) from None
    finally:
        stopped.set()


def cause_of(error: BaseException) -> BaseException:
    """Return the exception that a worker raised, without Ray's wrapper and traceback."""
    ray = sys.modules.get("ray")  # only `start_ray` imports it, after setting its environment
    wrapped = ray is not None and isinstance(error, ray.exceptions.RayTaskError)
    return (error.cause if wrapped else error).with_traceback(None)  # type: ignore[attr-defined]
