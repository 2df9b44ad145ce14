"""The training loop of one Ray Train worker: models, steps, checkpoints and validation.

Heavy packages are imported inside functions: Ray's own processes import this module without running the loop.
"""

import logging
import math
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagerag.artifacts import TrainingSet
from imagerag.errors import UserError
from imagerag.progress import duration
from imagerag.training.config import FinetuneConfig, LossWeights, TrainDtype, describe_accuracy
from imagerag.training.tracking import MlflowTracker

if TYPE_CHECKING:
    import torch

    from imagerag.base.model import BaseModel
    from imagerag.training.data import RagData
    from imagerag.training.trainer import Finetuning

logger = logging.getLogger(__name__)

STATE = "state.pt"
"""File in a checkpoint with the state to resume from; the other files are the exported weights."""
SCORE, ACCURACY = "score", "discriminator_accuracy"
_GRID = "validation.png"
_LOG_EVERY = 10
_SAY_EVERY_S = 1.0
_MOST_NAMED = 32


@dataclass(frozen=True)
class Task:
    """The arguments of a worker."""

    training_set: TrainingSet
    config: FinetuneConfig
    dtype: TrainDtype
    num_threads: int
    tracking_uri: str
    run_id: str


class Board:
    """Ray actor that holds the latest progress of a training."""

    def __init__(self) -> None:
        self._latest: tuple[int, str] | None = None

    def put(self, done: int, note: str) -> None:
        """Store the number of completed steps and a note."""
        self._latest = (done, note)

    def take(self) -> tuple[int, str] | None:
        """Return the latest progress, or None."""
        return self._latest


def train(arguments: dict[str, Any]) -> Exception | None:
    """Train on one worker. Deterministic errors are returned, because Ray restarts workers that raise."""
    task, board, places = (arguments[name] for name in ("task", "board", "places"))
    try:
        _train_steps(task, board, places)
    except (UserError, FloatingPointError) as error:
        return error
    return None


def _train_steps(task: Task, board: Any, places: Any) -> None:
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from imagerag.training.data import RagData
    from imagerag.training.loader import Loader

    torch.set_num_threads(task.num_threads)  # Ray sets 1
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    training, base = _prepare(task, device, num_workers)
    _resume(training, ray.train.get_checkpoint())
    data = RagData(task.training_set, base, ray.get(places))
    loader = Loader(data, task.config, device, rank=rank, num_workers=num_workers)
    started, first, said = time.monotonic(), training.done, 0.0
    with MlflowTracker(task.tracking_uri, task.run_id) if rank == 0 else nullcontext() as tracker:
        for loads in loader.steps(first):
            values = training.step(loads)
            done, steps = training.done, task.config.steps
            if len(training.suspects):
                rows = ", ".join(data.describe(training.suspects[:_MOST_NAMED]))
                more = f" and {len(training.suspects) - _MOST_NAMED} more" * (len(training.suspects) > _MOST_NAMED)
                logger.warning(
                    "step %s was skipped, its gradient is not finite; this worker's rows: %s%s", done - 1, rows, more
                )
            is_checkpoint = done % task.config.checkpoint_every == 0 or done == steps
            if tracker is not None:
                values["samples_per_s"] = task.config.batch_size / values["step_s"]
                if done % _LOG_EVERY == 0 or is_checkpoint:
                    tracker.metrics(values | _memory(device), done)
                now = time.monotonic()
                if now - said >= _SAY_EVERY_S or is_checkpoint:
                    said = now
                    left_s = (now - started) / (done - first) * (steps - done)
                    rows_per_s = f"{values['samples_per_s']:.0f} rows/s"
                    board.put.remote(done, f"{_losses(values)}, {rows_per_s}, {duration(left_s)} left")
            if is_checkpoint:
                data.check()
                _report(training, data, tracker)


def _prepare(task: Task, device: "torch.device", num_workers: int) -> "tuple[Finetuning, BaseModel]":
    """Load the models, and return the training in its initial state and the student."""
    import ray.train.torch
    import torch

    from imagerag.base.model import load_base
    from imagerag.training.perceptual import load_perceptual
    from imagerag.training.trainer import Finetuning

    own = task.training_set
    base, teacher = load_base(own.base, str(device), task.dtype), load_base(own.teacher, str(device), task.dtype)
    for loaded, digest in ((base, own.base_digest), (teacher, own.teacher_digest)):
        if loaded.identity.digest != digest:
            raise UserError(
                f"{loaded.identity.id} must be the same on every machine; its digest is {digest} in the training set "
                f"and {loaded.identity.digest} on a worker"
            )
    config = task.config
    network = config.perceptual_network if config.losses.perceptual else None
    perceptual = None if network is None else load_perceptual(network, device)
    training = Finetuning(
        base,
        teacher.unet,
        perceptual,
        config,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[task.dtype],
        wrap=ray.train.torch.prepare_model if num_workers > 1 else lambda module: module,
    )
    return training, base


def _report(training: "Finetuning", data: "RagData", tracker: MlflowTracker | None) -> None:
    """Validate and report a checkpoint to Ray; a barrier for all workers."""
    import ray.train
    import torch

    if tracker is None:
        ray.train.report({}, checkpoint=None)
        return
    values, picture = training.validate(data)
    tracker.metrics({f"validation/{name}": value for name, value in values.items()}, training.done)
    if not math.isnan(training.accuracy):
        tracker.tag("discriminator", describe_accuracy(training.accuracy))
    tracker.image(f"validation/{training.done:06d}.png", picture)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(training.state_dict(), Path(folder) / STATE)
        training.export(Path(folder))
        picture.save(Path(folder) / _GRID)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        result = {SCORE: values[SCORE], "step": training.done, ACCURACY: training.accuracy}
        tracker.flush()  # a training that goes on from this checkpoint does not validate it again
        ray.train.report(result, checkpoint=checkpoint)


def _resume(training: "Finetuning", checkpoint: Any) -> None:
    import torch

    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
        training.load_state_dict(state)


def _losses(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.3f}" for name in LossWeights.model_fields if name in values)


def _memory(device: "torch.device") -> dict[str, float]:
    """Return the peak memory of this worker in GiB."""
    import resource

    import torch

    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
