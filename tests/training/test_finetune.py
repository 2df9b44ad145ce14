"""Fine-tuning on Ray Train: the same curve, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

import imagerag.training.finetune as module
from imagerag.artifacts import Finetuned, TrainingSet
from imagerag.errors import UserError
from imagerag.generation.finetuned import ADAPTER, LORA, MANIFEST
from imagerag.settings import Settings
from imagerag.storage.files import write_json
from imagerag.storage.keyed_table import KeyedTable
from imagerag.training.config import FinetuneConfig, LossWeights, ReferenceChoice, TrainWorkersConfig
from imagerag.training.finetune import EXPERIMENT, finetune, key_of
from imagerag.training.perceptual import LatentNetwork
from imagerag.training.tracking import tracking_uri
from tests.training.conftest import World

pytestmark = pytest.mark.engines

STEPS = 8
WORKERS = TrainWorkersConfig(device="cpu", num_workers=1)
# A driver learns of each checkpoint before the next one.
POLL_S = 0.05


def make_config(**changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "references": ReferenceChoice(number=2, own=0.4, own_among=0.1, none=0.1, random=0.2),
        "losses": LossWeights(perceptual=0.0),
        "steps": STEPS, "batch_size": 8, "micro_batch_size": 4, "warmup_steps": 1, "adapter_inner_dim": 64,
        "lora_rank": 2, "learning_rate": 1e-2, "heads_learning_rate": 1e-3, "checkpoint_every": 2, "num_validated": 2,
    }  # fmt: skip
    return FinetuneConfig(**values | changes)


def curve(settings: Settings, run_id: str, name: str = "validation/score") -> dict[int, float]:
    """The last value that each step has in MLflow."""
    from mlflow import MlflowClient

    history = MlflowClient(tracking_uri(settings)).get_metric_history(run_id, name)
    return {metric.step: metric.value for metric in sorted(history, key=lambda each: each.timestamp)}


@pytest.fixture(scope="module")
def undisturbed(
    ray_session: None, world_folder: Path, training_set: TrainingSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Finetuned, dict[int, float]]:
    """What is trained where nothing dies, and its curve."""
    settings = Settings(home=tmp_path_factory.mktemp("undisturbed"))
    made = finetune(training_set, make_config(), WORKERS, settings)
    return made, curve(settings, made.run_id)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def weights_of(made: Finetuned) -> dict[str, Any]:
    (adapter,), (lora,) = (list(Path(made.uri, name).glob("*.safetensors")) for name in (ADAPTER, LORA))
    return load_file(adapter) | load_file(lora)


def assert_same(made: Finetuned, run: dict[int, float], undisturbed: tuple[Finetuned, dict[int, float]]) -> None:
    """The curve within 0.1 %, and each weight within one: threads add up in another order each time."""
    expected, expected_run = undisturbed
    assert run.keys() == expected_run.keys() == {2, 4, 6, 8}
    assert run == pytest.approx(expected_run, rel=1e-3)
    weights, expected_weights = weights_of(made), weights_of(expected)
    for name, weight in expected_weights.items():
        assert (weights[name] - weight).abs().max() <= 0.01 * weight.abs().max() + 1e-5, name


def test_it_leaves_an_adapter_and_its_origin(
    undisturbed: tuple[Finetuned, dict[int, float]], training_set: TrainingSet
) -> None:
    made, run = undisturbed
    assert made.name == key_of(training_set, make_config(), WORKERS.dtype)
    manifest = json.loads(Path(made.uri, MANIFEST).read_text())
    assert manifest["training_set"] == json.loads(json.dumps(vars(training_set)))
    assert FinetuneConfig(**manifest["config"]) == make_config()
    assert made.score == pytest.approx(run[STEPS])
    assert made.best_score == pytest.approx(min(run.values()))
    assert run[made.best_step] == pytest.approx(made.best_score)
    assert any(weight.abs().max() > 0 for name, weight in weights_of(made).items() if name.startswith("to_out"))
    kept = [each for each in Path(made.uri).parent.parent.glob("runs/*/checkpoint_*") if each.is_dir()]
    assert 1 <= len(kept) <= 2, "the best and the last"


def test_mlflow_has_curves_terms_inputs_and_pictures(undisturbed: tuple[Finetuned, dict[int, float]]) -> None:
    from mlflow import MlflowClient

    made, _ = undisturbed
    settings = Settings(home=Path(made.uri).parents[3])
    client = MlflowClient(tracking_uri(settings))
    (experiment,) = client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == made.run_id
    assert run.info.status == "FINISHED"
    wanted = {"adversarial", "distillation", "discriminator", "accuracy", "grad_norm", "heads_grad_norm"}
    assert run.data.metrics.keys() >= wanted | {"data_s", "step_s", "samples_per_s", "memory_gib", "learning_rate"}
    assert run.data.params["losses.distillation"] == "2.5"
    assert run.data.tags["base_digest"] == made.base_digest
    assert len(client.list_artifacts(run.info.run_id, "validation")) == STEPS / 2


def test_what_was_finished_is_not_trained_again(
    undisturbed: tuple[Finetuned, dict[int, float]], training_set: TrainingSet
) -> None:
    made, _ = undisturbed
    settings = Settings(home=Path(made.uri).parents[3])
    again = finetune(training_set, make_config(), WORKERS, settings, lambda *_: pytest.fail("a step"))
    assert not again.is_new
    assert (again.uri, again.run_id, again.score) == (made.uri, made.run_id, made.score)


def test_a_driver_that_is_killed_before_it_publishes_trains_nothing_again(
    undisturbed: tuple[Finetuned, dict[int, float]], training_set: TrainingSet
) -> None:
    made, run = undisturbed
    settings = Settings(home=Path(made.uri).parents[3])
    weights = weights_of(made)
    for path in (Path(made.uri, MANIFEST), *Path(made.uri, LORA).iterdir()):
        path.unlink()
    again = finetune(training_set, make_config(), WORKERS, settings, lambda *_: pytest.fail("a step"))
    assert (again.uri, again.run_id, again.score) == (made.uri, made.run_id, made.score)
    assert (again.best_step, again.best_score) == (made.best_step, made.best_score)
    assert all((weights_of(again)[name] == weight).all() for name, weight in weights.items())
    assert curve(settings, again.run_id) == run


def test_another_dtype_is_another_training(
    undisturbed: tuple[Finetuned, dict[int, float]], training_set: TrainingSet, settings: Settings
) -> None:
    """Neither is returned for the other, nor resumed as the other."""
    made, _ = undisturbed
    of_default, of_bf16 = (key_of(training_set, make_config(), dtype) for dtype in (None, "bf16"))
    assert of_default == made.name
    for key in (of_default, of_bf16):  # as two finished trainings leave them
        folder = f"{settings.training_of(training_set.index_name)}/finetuned/{key}"
        write_json(f"{folder}/{MANIFEST}", {"finetuned": asdict(replace(made, uri=folder, name=key))})
    assert finetune(training_set, make_config(), WORKERS, settings).name == of_default
    in_bf16 = WORKERS.model_copy(update={"dtype": "bf16"})
    assert finetune(training_set, make_config(), in_bf16, settings).name == of_bf16 != of_default


def test_another_perceptual_network_under_the_same_name_is_another_training(
    training_set: TrainingSet, tmp_path: Path
) -> None:
    folder = tmp_path / "network"
    LatentNetwork(channels=(8, 8)).save_pretrained(folder)
    config = make_config(losses=LossWeights(), perceptual_network=str(folder))
    first = key_of(training_set, config, None)
    assert key_of(training_set, config, None) == first
    LatentNetwork(channels=(8, 8)).save_pretrained(folder)
    assert key_of(training_set, config, None) != first


def test_two_workers_learn_what_one_does(
    undisturbed: tuple[Finetuned, dict[int, float]], training_set: TrainingSet, settings: Settings
) -> None:
    """On the same rows, noise, references and spectral norms; they add up in another order."""
    made = finetune(training_set, make_config(), TrainWorkersConfig(device="cpu", num_workers=2), settings)
    assert curve(settings, made.run_id) == pytest.approx(undisturbed[1], rel=1e-3)


@pytest.mark.gpu
def test_a_gpu_learns_what_a_cpu_does(ray_session: None, training_set: TrainingSet, tmp_path: Path) -> None:
    """Without the judge, whose noise is drawn where it judges: another noise changed the curve by up to 20 %."""
    config = make_config(losses=LossWeights(adversarial=0.0, perceptual=0.0))
    on_cpu, on_gpu = Settings(home=tmp_path / "cpu"), Settings(home=tmp_path / "gpu")
    expected = finetune(training_set, config, WORKERS, on_cpu)
    made = finetune(training_set, config, TrainWorkersConfig(device="cuda", num_workers=1, dtype="fp32"), on_gpu)
    assert curve(on_gpu, made.run_id) == pytest.approx(curve(on_cpu, expected.run_id), rel=0.05)


def test_a_killed_driver_goes_on_and_a_killed_worker_is_replaced(
    undisturbed: tuple[Finetuned, dict[int, float]],
    training_set: TrainingSet,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First the driver with its whole local Ray, as when the machine goes down; then the worker of the next one."""
    script = (
        "import json, sys; from tests.training.test_finetune import *\n"
        "training_set = TrainingSet(**json.loads(sys.argv[1]))\n"
        "settings, module._POLL_S = Settings(home=sys.argv[2]), POLL_S\n"
        "finetune(training_set, make_config(), WORKERS, settings, lambda *_: kill_driver(settings))\n"
    )
    arguments = [sys.executable, "-c", script, json.dumps(vars(training_set)), str(settings.home)]
    driver = subprocess.run(arguments, start_new_session=True, check=False, timeout=300)
    assert driver.returncode == -signal.SIGKILL
    monkeypatch.setattr(module, "_POLL_S", POLL_S)
    seen: list[int] = []
    killed: list[int] = []

    def kill(done: int, total: int, note: str = "") -> None:
        seen.append(done)
        if not killed:
            killed.extend(worker.pid for worker in _train_workers())
            for pid in killed:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    made = finetune(training_set, make_config(), WORKERS, settings, kill)
    assert killed
    assert min(seen) > 2, "it went on from a checkpoint"
    assert_same(made, curve(settings, made.run_id), undisturbed)


def test_a_gradient_that_is_no_number_ends_it_at_once(training_set: TrainingSet, settings: Settings) -> None:
    from mlflow import MlflowClient

    config = make_config(learning_rate=1e30, steps=6, max_skipped=1)
    with pytest.raises(FloatingPointError, match=r"step \d: .*grad_norm is (nan|inf), and 1 steps in a row .*=1e\+30"):
        finetune(training_set, config, WORKERS, settings)
    run = MlflowClient(tracking_uri(settings)).search_runs(["1"])[0]
    assert run.info.status == "FAILED"


def test_latents_that_were_deleted_are_named(own_world: World, settings: Settings) -> None:
    """The task that finds places raises it; the user must not see Ray's traceback."""
    training_set = own_world.synthesize()
    table = KeyedTable.at(training_set.real_uri)
    table.drop(table.ids()[:2])
    with pytest.raises(UserError, match=r"^the training set lacks 2 latents, which were deleted: make it again$"):
        finetune(training_set, make_config(), WORKERS, settings)


def test_workers_that_do_not_divide_the_batch_are_refused(training_set: TrainingSet, settings: Settings) -> None:
    with pytest.raises(UserError, match="number of workers, got 1 micro-batches and 2 workers"):
        finetune(training_set, make_config(batch_size=4), TrainWorkersConfig(num_workers=2), settings)


def test_a_perceptual_loss_without_a_network_is_refused(training_set: TrainingSet, settings: Settings) -> None:
    config = make_config(losses=LossWeights(), perceptual_network="elatentlpips:sd21")
    with pytest.raises(UserError, match="`pip install elatentlpips`"):
        finetune(training_set, config, WORKERS, settings)
    assert not (settings.home / "mlflow").exists(), "before anything started"


def kill_driver(settings: Settings) -> None:
    """Kill this process and all below it as soon as there is a checkpoint to go on from.

    Called by the driver's progress callback: another process might look only after the last step.
    """
    is_there = False
    while not is_there:
        time.sleep(POLL_S)
        with suppress(ValueError):  # Ray is writing it
            found = settings.home.glob("training/*/runs/*/checkpoint_manager_snapshot.json")
            is_there = any(json.loads(path.read_text()) for path in found)
    for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _train_workers() -> list[psutil.Process]:
    """Ray Train's workers of this session."""
    children = psutil.Process().children(recursive=True)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = []
        for child in children:
            with suppress(psutil.Error):  # it may have ended since
                found += [child] if "TrainWorker" in " ".join(child.cmdline()) else []
        if found:
            return found
        children = psutil.Process().children(recursive=True)
    raise AssertionError(children)
