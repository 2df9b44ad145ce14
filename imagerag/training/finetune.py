"""Fault-tolerant fine-tuning on Ray Train with any number of CPU or GPU workers.

The name of a training is a digest of its configuration and inputs. So the same call resumes a stopped training and
returns a finished one at once. A batch depends only on its number and the seed, so neither a restart nor the number of
workers changes the training data.

The result is the EMA weights of the last step. Validation losses favour blur, which the adversarial loss counteracts,
so the step with the best score is only kept as a checkpoint, for manual selection.
"""

import hashlib
import json
import math
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec

from imagerag.artifacts import Finetuned, TrainingSet
from imagerag.compute import start_ray, stop_ray
from imagerag.errors import UserError
from imagerag.generation.finetuned import MANIFEST
from imagerag.progress import OnProgress, silent
from imagerag.retrieval.pins import TRAINING, held
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.files import read_json, write_json
from imagerag.storage.locks import check_locks, writer_lock
from imagerag.training.config import FinetuneConfig, TrainDtype, TrainWorkersConfig
from imagerag.training.places import find_places
from imagerag.training.tracking import lasting_run, log_index, tracking_uri
from imagerag.training.worker import ACCURACY, SCORE, STATE, Board, Task, train
from imagerag.workers import StalledError, cause_of, plan_workers

EXPERIMENT = "finetune"
_POLL_S = 1.0
_VERSION = 5
"""Version of the training code; a change gives every training a new name."""


def finetune(
    training_set: TrainingSet,
    config: FinetuneConfig,
    workers: TrainWorkersConfig,
    settings: Settings,
    on_progress: OnProgress = silent,
    *,
    group: str | None = None,
) -> Finetuned:
    """Train an adapter, resuming from the last checkpoint, and return a reference to it.

    Idempotent: a finished training is returned at once.

    Args:
        training_set: examples and references to train on.
        config: training configuration.
        workers: number, device and dtype of the workers.
        settings: locations of trainings and MLflow.
        on_progress: progress callback, called with steps.
        group: name of a parent MLflow run, for ablations.

    Raises:
        UserError: if the network of the perceptual loss is missing, or the workers do not divide the batch.
        FloatingPointError: if `config.max_skipped` steps in a row had non-finite gradients.
        StalledError: if no step ends for `workers.stall_timeout_s`. Calling again resumes from the last checkpoint.
    """
    from imagerag.training.perceptual import choose_perceptual

    started = time.perf_counter()
    config = choose_perceptual(config, training_set.base)
    key = key_of(training_set, config, workers.dtype)
    folder = f"{settings.training_of(training_set.index_name)}/finetuned/{key}"
    with writer_lock(settings.training_of(training_set.index_name), key):
        if (manifest := read_json(f"{folder}/{MANIFEST}")) is not None:
            done = Finetuned(**manifest["finetuned"])
            return replace(done, is_new=False, duration_s=time.perf_counter() - started)
        with held(Store(training_set.index_uri, training_set.index_name), training_set.index_version, TRAINING + key):
            start_ray(settings)
            run_path = f"{settings.training_of(training_set.index_name)}/runs/{key}.json"
            run_id = _tracked_run(run_path, key, training_set, config, settings, group)
            result = _fit(key, run_id, training_set, config, workers, settings, on_progress)
            accuracy = float(result.metrics[ACCURACY])
            best = min((metrics for _, metrics in result.best_checkpoints), key=lambda each: each[SCORE])
            finetuned = Finetuned(
                uri=folder,
                name=key,
                base=training_set.base,
                base_digest=training_set.base_digest,
                index_name=training_set.index_name,
                index_version=training_set.index_version,
                run_id=run_id,
                num_steps=config.steps,
                score=float(result.metrics[SCORE]),
                best_step=int(best["step"]),
                best_score=float(best[SCORE]),
                is_new=True,
                discriminator_accuracy=None if math.isnan(accuracy) else accuracy,
                duration_s=time.perf_counter() - started,
            )
            _publish(
                result.checkpoint, finetuned, {"training_set": asdict(training_set), "config": config.model_dump()}
            )
    return finetuned


def read_finetuned(folder: str) -> Finetuned:
    """Read a finished training from its folder, which may have been moved.

    Raises:
        UserError: if the folder holds no finished training.
    """
    return replace(Finetuned(**_read_manifest(folder)["finetuned"]), uri=folder, is_new=False)


def training_set_of(finetuned: Finetuned) -> TrainingSet:
    """Return the training set of an adapter, with URIs adjusted if the home was moved.

    Raises:
        UserError: if the folder of `finetuned` holds no finished training.
    """
    manifest = _read_manifest(finetuned.uri)
    made = TrainingSet(**manifest["training_set"])
    former, now = (uri.rsplit("/", 2)[0] for uri in (manifest["finetuned"]["uri"], finetuned.uri))

    def moved(uri: str) -> str:
        return now + uri.removeprefix(former) if uri.startswith(f"{former}/") else uri

    return replace(
        made,
        real_uri=moved(made.real_uri),
        teacher_uri=made.teacher_uri and moved(made.teacher_uri),
        references_uri=moved(made.references_uri),
    )


def _read_manifest(folder: str) -> dict[str, Any]:
    manifest = read_json(f"{folder}/{MANIFEST}")
    if manifest is None:
        raise UserError(f"there is no {MANIFEST} in {folder}: `imagerag finetune` makes one")
    return manifest


def newest_finetuned(settings: Settings, name: str) -> Finetuned:
    """Return the most recently finished training on a corpus.

    Raises:
        UserError: if there is none.
    """
    filesystem, folder = fsspec.url_to_fs(f"{settings.training_of(name)}/finetuned")
    manifests = filesystem.glob(f"{folder}/*/{MANIFEST}")
    if not manifests:
        raise UserError(f"no adapter was trained on {name!r} yet: `imagerag finetune --name {name}` does it")
    newest = max(manifests, key=filesystem.modified)
    return read_finetuned(filesystem.unstrip_protocol(newest.rsplit("/", 1)[0]).removeprefix("file://"))


def key_of(training_set: TrainingSet, config: FinetuneConfig, dtype: TrainDtype | None) -> str:
    """Return the name of a training: a digest of everything that its result depends on.

    Args:
        training_set: examples and references to train on.
        config: training configuration, with the network of the perceptual loss chosen.
        dtype: the workers' dtype; None leaves it to the device that there is, and adds nothing to the name, so that a
            training can be resumed on another machine.
    """
    inputs: dict[str, Any] = {
        "version": _VERSION,
        "base": training_set.base_digest,
        "teacher": training_set.teacher_digest,
        # By name, so that a home can be moved.
        "tables": [
            uri and uri.rsplit("/", 1)[-1]
            for uri in (training_set.real_uri, training_set.teacher_uri, training_set.references_uri)
        ],
        "num_teacher": training_set.num_teacher,
        "config": config.model_dump(),
    }
    if config.losses.perceptual:
        from imagerag.training.perceptual import perceptual_digest

        assert config.perceptual_network is not None, "chosen before"
        inputs["perceptual"] = perceptual_digest(config.perceptual_network)
    if dtype is not None:
        inputs["dtype"] = dtype
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _fit(
    key: str,
    run_id: str,
    training_set: TrainingSet,
    config: FinetuneConfig,
    workers: TrainWorkersConfig,
    settings: Settings,
    on_progress: OnProgress,
) -> Any:
    """Run the Ray Train job to its end, and return its result."""
    import ray

    device, num_workers, num_threads = plan_workers(ray.nodes(), workers)
    parts = config.batch_size // config.micro_batch_size
    if parts % num_workers:
        raise UserError(
            "batch_size / micro_batch_size must be a multiple of the number of workers, got "
            f"{parts} micro-batches and {num_workers} workers"
        )
    # On the driver's node, like Ray Train's controller: other nodes may be lost.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    board = ray.remote(num_cpus=0, label_selector=here)(Board).remote()
    finding = ray.remote(num_cpus=0, label_selector=here, retry_exceptions=[OSError])(find_places)
    places = finding.remote(training_set)
    task = Task(
        training_set=training_set,
        config=config,
        dtype=workers.dtype or ("bf16" if device == "cuda" else "fp32"),
        num_threads=num_threads,
        tracking_uri=tracking_uri(settings),
        run_id=run_id,
    )
    use = {"use_gpu": True} if device == "cuda" else {"resources_per_worker": {"CPU": num_threads}}
    trainer = _trainer(
        {"task": task, "board": board, "places": places},
        {"num_workers": num_workers} | use,
        name=key,
        storage_path=f"{settings.training_of(training_set.index_name)}/runs",
        max_failures=workers.max_failures,
    )
    try:
        result = _watch(trainer, board, config, workers.stall_timeout_s, on_progress)
    except BaseException:
        # Abandoned workers keep the cores that a retry needs.
        stop_ray()
        raise
    if isinstance(result.return_value, Exception):
        raise cause_of(result.return_value)
    return result


def _trainer(
    arguments: dict[str, Any], scaling: dict[str, Any], *, name: str, storage_path: str, max_failures: int
) -> Any:
    """Return a Ray trainer of `train` with these arguments, whose checkpoints are in `storage_path/name`."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    return TorchTrainer(
        train,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=max_failures),
            # Ray also keeps the latest checkpoint.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=SCORE, checkpoint_score_order="min"
            ),
        ),
    )


def _tracked_run(
    path: str,
    key: str,
    training_set: TrainingSet,
    config: FinetuneConfig,
    settings: Settings,
    group: str | None,
) -> str:
    """Return the id of the training's MLflow run, the same one after a restart."""
    parameters = _flat(config.model_dump()) | {"base": training_set.base, "teacher": training_set.teacher}
    tags = {name: str(value) for name, value in asdict(training_set).items() if "digest" in name or "uri" in name}
    tags["index_version"] = str(training_set.index_version)
    run_id = lasting_run(path, settings, EXPERIMENT, key, parameters, tags, group=group)
    store = Store(training_set.index_uri, training_set.index_name)
    log_index(settings, run_id, store, training_set.index_version, "training")
    return run_id


def _publish(checkpoint: Any, finetuned: Finetuned, about: dict[str, Any]) -> None:
    """Copy the exported weights from the checkpoint to the final folder, the manifest last."""
    check_locks()
    filesystem, folder = fsspec.url_to_fs(finetuned.uri)
    with checkpoint.as_directory() as trained:
        for path in sorted(Path(trained).rglob("*")):
            if path.is_file() and path.name != STATE and not path.name.startswith("."):
                target = f"{folder}/{path.relative_to(trained).as_posix()}"
                filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                filesystem.put_file(str(path), target)
    write_json(f"{finetuned.uri}/{MANIFEST}", {"finetuned": asdict(finetuned)} | about)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _watch(trainer: Any, board: Any, config: FinetuneConfig, timeout_s: float, on_progress: OnProgress) -> Any:
    """Run the trainer in a separate thread, report progress, and return its result.

    Raises:
        StalledError: if no step ends for `timeout_s`.
    """
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
        check_locks()
        with suppress(ray.exceptions.RayError):
            now = ray.get(board.take.remote(), timeout=10)
            if now is not None and now != latest:
                latest, changed = now, time.monotonic()
                on_progress(now[0], config.steps, now[1])
        if time.monotonic() - changed > timeout_s:
            raise StalledError(
                f"no step ended for {timeout_s:.0f} s. Checkpoints are kept: run the same again to resume"
            )
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
