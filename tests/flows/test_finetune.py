"""`finetune` through a real Prefect server."""

from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from flows.finetune import FinetuneParameters, finetune
from imagerag.training.config import FinetuneConfig, LossWeights, ReferenceChoice, TrainWorkersConfig
from tests.training.conftest import NAME, World

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("ray_session", "prefect_api_url")]


def parameters(world: World, **changes: object) -> FinetuneParameters:
    training = FinetuneConfig(
        references=ReferenceChoice(number=2), losses=LossWeights(perceptual=0.0), steps=4, batch_size=4,
        micro_batch_size=4, adapter_inner_dim=64, lora_rank=2, checkpoint_every=2, num_validated=2,
    )  # fmt: skip
    values = {"name": NAME, "data": world.config(), "training": training, "workers": TrainWorkersConfig(num_workers=1)}
    return FinetuneParameters(**values | changes)  # type: ignore[arg-type]


def test_a_dry_run_says_what_it_takes_and_starts_nothing(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(own_world.settings.home))
    report = finetune(parameters(own_world, dry_run=True))
    assert report.finetuned is None
    assert (report.plan.num_rows, report.plan.num_held_out, report.plan.steps) == (8, 2, 4)
    assert not Path(own_world.settings.training_of(NAME)).exists()


def test_an_adapter_is_trained_and_a_second_run_does_nothing(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(own_world.settings.home))
    first = finetune(parameters(own_world))
    assert first.training_set is not None
    assert first.finetuned is not None
    assert first.training_set.num_added == 10 + 10
    assert first.finetuned.is_new
    second = finetune(parameters(own_world))
    assert second.training_set is not None
    assert second.finetuned is not None
    assert second.training_set.num_added == 0
    assert not second.finetuned.is_new
    assert second.finetuned.uri == first.finetuned.uri
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
    texts = [str(artifact.data) for artifact in artifacts]
    assert any("what the training takes" in text for text in texts)
    assert any(first.finetuned.uri in text for text in texts)
    progress = [artifact.description for artifact in artifacts if artifact.type == "progress"]
    assert any(text.startswith("train: 4 of 4 steps (adversarial") and "left" in text for text in progress), progress
