"""Ray Data jobs that map a model over rows: configuration, placement of workers, and detection of stalls."""

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import pyarrow as pa
from pydantic import Field

from imagerag.config import Config
from imagerag.errors import UserError

T = TypeVar("T")
Dtype = Literal["fp32", "bf16", "fp16"]

_WORKER_CORES = 8


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


class Commits:
    """Commits what workers wrote in groups, because each version of a table lists all of its fragments."""

    def __init__(self, commit: Callable[[list[str]], object], every_s: float) -> None:
        self._commit, self._every_s = commit, every_s
        self._written: list[str] = []
        self._last = time.monotonic()

    def add(self, written: Iterable[str]) -> None:
        """Take what a worker wrote, and commit all there is if it is time."""
        self._written += written
        if time.monotonic() - self._last >= self._every_s:
            self.finish()

    def finish(self) -> None:
        """Commit the rest."""
        if self._written:
            self._commit(self._written)
        self._written, self._last = [], time.monotonic()


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


def resources_of(device: str, num_threads: int) -> dict[str, int]:
    """Return the resources that Ray reserves for one worker."""
    return {"num_gpus": 1} if device == "cuda" else {"num_cpus": num_threads}


def mapped(
    parts: Sequence[pa.Table], worker: type, arguments: Mapping[str, Any], config: WorkersConfig
) -> Iterator[dict[str, Any]]:
    """Yield the rows that workers return for parts of a table, in order of completion.

    Args:
        parts: batches; a worker that dies loses only its current one.
        worker: class that is instantiated in its own process and called with each part.
        arguments: constructor arguments, in addition to `device`, `dtype` and `num_threads`.
        config: number and device of the workers.
    """
    import ray
    from ray.data import ActorPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs every plan and every finished execution
    device, num_workers, num_threads = plan_workers(ray.nodes(), config)
    dataset = ray.data.from_arrow(list(parts))
    dataset.context.enable_progress_bars = False
    dataset.context.raise_original_map_exception = True
    results = dataset.map_batches(
        worker,
        fn_constructor_kwargs={"device": device, "dtype": config.dtype, "num_threads": num_threads, **arguments},
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(num_workers, len(parts))),
        **resources_of(device, num_threads),
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
            end = _cause(error)
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


def _cause(error: BaseException) -> BaseException:
    """Return the exception that a worker raised, without Ray's wrapper and traceback."""
    ray = sys.modules.get("ray")  # only `start_ray` imports it, after setting its environment
    wrapped = ray is not None and isinstance(error, ray.exceptions.RayTaskError)
    return (error.cause if wrapped else error).with_traceback(None)  # type: ignore[attr-defined]
