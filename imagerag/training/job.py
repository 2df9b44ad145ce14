"""Fine-tuning on Ray Train: any number of workers, CPU or GPU, that may die at any moment.

The name of a training follows from its configuration and its inputs. So the same call goes on with a training that was
stopped, and returns at once what was finished. Batches depend on nothing but their number and the seed, hence neither a
restart nor another number of workers changes what is learnt from.

What is kept are the averaged weights of the last step. The validation's losses favour blur, which the adversarial loss
is there to take away, so their best step is kept as a checkpoint beside it and chosen by a person, if at all.
"""

import hashlib
import json
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from imagerag.artifacts import Finetuned, TrainingSet
from imagerag.compute import start_ray, stop_ray
from imagerag.errors import UserError
from imagerag.generation.finetuned import MANIFEST
from imagerag.locks import writer_lock
from imagerag.progress import OnProgress, silent
from imagerag.settings import Settings
from imagerag.training.config import FinetuneConfig, LossWeights, TrainWorkersConfig
from imagerag.training.tracking import MlflowTracker, start_run, tracking_uri
from imagerag.workers import Dtype, StalledError, plan_workers

if TYPE_CHECKING:
    import torch

    from imagerag.retrieval.schema import FeatureIdentity
    from imagerag.training.data import RagData
    from imagerag.training.finetune import Finetuning

EXPERIMENT = "finetune"
_STATE, _GRID = "state.pt", "validation.png"
_SCORE = "score"
_LOG_EVERY = 10
_POLL_S = 0.5
_VERSION = 1
"""Of what a step does: another one is another training."""


@dataclass(frozen=True)
class _Task:
    """What a worker is told."""

    training_set: TrainingSet
    config: FinetuneConfig
    dtype: Dtype
    num_threads: int
    tracking_uri: str
    run_id: str


def finetune(
    training_set: TrainingSet,
    config: FinetuneConfig,
    workers: TrainWorkersConfig,
    settings: Settings,
    on_progress: OnProgress = silent,
) -> Finetuned:
    """Train an adapter, or go on with training it, and return where it is.

    Args:
        training_set: what is learnt from.
        config: how.
        workers: on which machines.
        settings: where everything is.
        on_progress: is told of steps.

    Raises:
        UserError: if a loss needs a network that is not there, or workers do not divide the batch.
        FloatingPointError: if a gradient is not finite.
        StalledError: if no step ends for too long. Calling again goes on from the last checkpoint.
    """
    from imagerag.training.perceptual import check_perceptual

    started = time.perf_counter()
    if config.losses.perceptual:
        check_perceptual(config.perceptual_network)
    key = key_of(training_set, config)
    folder = f"{settings.training_of(training_set.index_name)}/finetuned/{key}"
    if (done := _read_manifest(folder)) is not None:
        return replace(done, is_new=False, duration_s=time.perf_counter() - started)
    with writer_lock(settings.training_of(training_set.index_name), key):
        start_ray(settings)
        try:
            result, run_id = _fit(key, training_set, config, workers, settings, on_progress)
        except BaseException:
            # Workers that nobody waits for any more keep the cores that the next try needs.
            stop_ray()
            raise
        best = min((metrics for _, metrics in result.best_checkpoints), key=lambda each: each[_SCORE])
        finetuned = Finetuned(
            uri=folder,
            name=key,
            base=training_set.base,
            base_digest=training_set.base_digest,
            index_name=training_set.index_name,
            index_version=training_set.index_version,
            run_id=run_id,
            num_steps=config.steps,
            score=float(result.metrics[_SCORE]),
            best_step=int(best["step"]),
            best_score=float(best[_SCORE]),
            is_new=True,
            duration_s=time.perf_counter() - started,
        )
        _publish(result.checkpoint, finetuned, {"training_set": asdict(training_set), "config": config.model_dump()})
    return finetuned


def key_of(training_set: TrainingSet, config: FinetuneConfig) -> str:
    """Return the name of the training: a digest of all that its result depends on."""
    inputs = {
        "version": _VERSION,
        "base": training_set.base_digest,
        "teacher": training_set.teacher_digest,
        "tables": [training_set.real_uri, training_set.teacher_uri, training_set.references_uri],
        "num_teacher": training_set.num_teacher,
        "config": config.model_dump(),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _fit(
    key: str,
    training_set: TrainingSet,
    config: FinetuneConfig,
    workers: TrainWorkersConfig,
    settings: Settings,
    on_progress: OnProgress,
) -> tuple[Any, str]:
    """Train to the end, and return Ray's result and MLflow's run."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    device, num_workers, num_threads = plan_workers(ray.nodes(), workers)
    parts = config.batch_size // config.micro_batch_size
    if parts % num_workers:
        raise UserError(
            f"every worker runs as many micro-batches: batch_size / micro_batch_size is {parts}, which is no multiple "
            f"of {num_workers} workers"
        )
    storage = f"{settings.training_of(training_set.index_name)}/runs"
    run_id = _tracked_run(f"{storage}/{key}.json", key, training_set, config, settings)
    board = ray.remote(num_cpus=0)(_Board).remote()
    task = _Task(
        training_set=training_set,
        config=config,
        dtype=workers.dtype or ("bf16" if device == "cuda" else "fp32"),
        num_threads=num_threads,
        tracking_uri=tracking_uri(settings),
        run_id=run_id,
    )
    trainer = TorchTrainer(
        _train,
        train_loop_config={"task": task, "board": board},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=device == "cuda",
            resources_per_worker=None if device == "cuda" else {"CPU": num_threads},
        ),
        run_config=RunConfig(
            name=key,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            # The newest is always kept beside the best.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=_SCORE, checkpoint_score_order="min"
            ),
        ),
    )
    result = _watch(trainer, board, config, workers.stall_timeout_s, on_progress)
    if isinstance(result.return_value, Exception):
        raise result.return_value
    return result, run_id


def _train(arguments: dict[str, Any]) -> Exception | None:
    """Train on one worker. What would fail again is returned: Ray starts workers anew that raise."""
    task, board = arguments["task"], arguments["board"]
    try:
        _train_steps(task, board)
    except (UserError, FloatingPointError) as error:
        return error
    return None


def _train_steps(task: "_Task", board: Any) -> None:
    import ray.train
    import ray.train.torch
    import torch

    from imagerag.training.data import Loader, RagData

    torch.set_num_threads(task.num_threads)  # Ray starts workers with one
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    training, features = _prepare(task, device, num_workers)
    _resume(training, ray.train.get_checkpoint())
    data = RagData(task.training_set, features)
    loader = Loader(data, task.config, device, rank=rank, num_workers=num_workers)
    tracker = MlflowTracker(task.tracking_uri, task.run_id) if rank == 0 else None
    started, first = time.monotonic(), training.done
    for loads in loader.steps(first):
        values = training.step(loads)
        done, steps = training.done, task.config.steps
        is_checkpoint = done % task.config.checkpoint_every == 0 or done == steps
        if rank == 0 and tracker is not None:
            values["samples_per_s"] = task.config.batch_size / values["step_s"]
            if done % _LOG_EVERY == 0 or is_checkpoint:
                tracker.metrics(values | _memory(device), done)
            left_s = (time.monotonic() - started) / (done - first) * (steps - done)
            board.put.remote(done, f"{_losses(values)}, {values['samples_per_s']:.0f} rows/s, {_minutes(left_s)} left")
        if is_checkpoint:
            _report(training, data, rank, tracker)
    if tracker is not None:
        tracker.close()


def _prepare(task: "_Task", device: "torch.device", num_workers: int) -> "tuple[Finetuning, FeatureIdentity]":
    """Load the models, and return the training at its start and whose features it needs."""
    import ray.train.torch
    import torch

    from imagerag.generation.base import load_base
    from imagerag.hspace.features import feature_identity
    from imagerag.training.finetune import Finetuning
    from imagerag.training.perceptual import load_perceptual

    own = task.training_set
    weights: Dtype = "fp32" if task.dtype == "fp32" else "bf16"
    base, teacher = load_base(own.base, str(device), weights), load_base(own.teacher, str(device), weights)
    for loaded, digest in ((base, own.base_digest), (teacher, own.teacher_digest)):
        if loaded.identity.digest != digest:
            raise UserError(
                f"{loaded.identity.id} must be the same on every machine; its digest is {digest} in the training set "
                f"and {loaded.identity.digest} on a worker"
            )
    config = task.config
    perceptual = load_perceptual(config.perceptual_network, device) if config.losses.perceptual else None
    training = Finetuning(
        base,
        teacher.unet,
        perceptual,
        config,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[weights],
        wrap=ray.train.torch.prepare_model if num_workers > 1 else lambda module: module,
    )
    return training, feature_identity(base.identity, base.unet.config)


def _report(training: "Finetuning", data: "RagData", rank: int, tracker: MlflowTracker | None) -> None:
    """Validate, and hand a checkpoint to Ray, which all workers wait for."""
    import ray.train
    import torch

    if tracker is None:
        ray.train.report({}, checkpoint=None)
        return
    values, picture = training.validate(data)
    tracker.metrics({f"validation/{name}": value for name, value in values.items()}, training.done)
    tracker.image(f"validation/{training.done:06d}.png", picture)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(training.state_dict(), Path(folder) / _STATE)
        training.export(Path(folder))
        picture.save(Path(folder) / _GRID)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({_SCORE: values[_SCORE], "step": training.done}, checkpoint=checkpoint)


def _resume(training: "Finetuning", checkpoint: Any) -> None:
    import torch

    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / _STATE, map_location="cpu", weights_only=True)
        training.load_state_dict(state)


def _tracked_run(path: str, key: str, training_set: TrainingSet, config: FinetuneConfig, settings: Settings) -> str:
    """Return the MLflow run of a training: the one that it had before it was stopped, or a new one."""
    known = None
    with suppress(FileNotFoundError), fsspec.open(path) as file:
        known = json.load(file)["run_id"]
    parameters = _flat(config.model_dump()) | {"base": training_set.base, "teacher": training_set.teacher}
    tags = {name: str(value) for name, value in asdict(training_set).items() if "digest" in name or "uri" in name}
    tags["index_version"] = str(training_set.index_version)
    run_id = start_run(settings, EXPERIMENT, key, parameters, tags, known)
    with fsspec.open(path, "w", auto_mkdir=True) as file:
        json.dump({"run_id": run_id}, file)
    return run_id


def _publish(checkpoint: Any, finetuned: Finetuned, about: dict[str, Any]) -> None:
    """Copy what was trained to where it is looked for; its manifest comes last."""
    filesystem, folder = fsspec.url_to_fs(finetuned.uri)
    with checkpoint.as_directory() as trained:
        for path in sorted(Path(trained).rglob("*")):
            if path.is_file() and path.name != _STATE and not path.name.startswith("."):
                target = f"{folder}/{path.relative_to(trained).as_posix()}"
                filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                filesystem.put_file(str(path), target)
    partial = f"{folder}/{MANIFEST}.partial"
    filesystem.pipe_file(partial, json.dumps({"finetuned": asdict(finetuned)} | about, indent=1).encode())
    filesystem.mv(partial, f"{folder}/{MANIFEST}")


def _read_manifest(folder: str) -> Finetuned | None:
    with suppress(FileNotFoundError), fsspec.open(f"{folder}/{MANIFEST}") as file:
        return Finetuned(**json.load(file)["finetuned"])
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _losses(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.3f}" for name in LossWeights.model_fields if name in values)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _memory(device: "torch.device") -> dict[str, float]:
    """Return the most memory that this worker has used, in GiB."""
    import resource

    import torch

    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


class _Board:
    """Where workers say how far they are."""

    def __init__(self) -> None:
        self._latest: tuple[int, str] | None = None

    def put(self, done: int, note: str) -> None:
        """Say it."""
        self._latest = (done, note)

    def take(self) -> tuple[int, str] | None:
        """Return what was said last."""
        return self._latest


def _watch(trainer: Any, board: Any, config: FinetuneConfig, timeout_s: float, on_progress: OnProgress) -> Any:
    """Run the trainer in a thread of its own, report its progress, and return its result."""
    import ray

    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:  # noqa: BLE001 - it is raised in the other thread
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    latest, changed = None, time.monotonic()
    while thread.is_alive():
        thread.join(_POLL_S)
        with suppress(ray.exceptions.RayError):
            now = ray.get(board.take.remote(), timeout=10)
            if now is not None and now != latest:
                latest, changed = now, time.monotonic()
                on_progress(now[0], config.steps, now[1])
        if time.monotonic() - changed > timeout_s:
            raise StalledError(
                f"no step ended for {timeout_s:.0f} s. Checkpoints are kept: run the same again to continue"
            )
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
