"""`finetune` through a real Prefect server; what it trains is in `test_pipeline`."""

from pathlib import Path

import pytest

from flows.finetune import finetune
from imagerag.training.config import FinetuneConfig, LossWeights, ReferenceChoice, TrainWorkersConfig
from tests.training.conftest import NAME, World

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("ray_session", "prefect_api_url")]


def parameters(world: World, **changes: object) -> dict[str, object]:
    training = FinetuneConfig(
        references=ReferenceChoice(number=2), losses=LossWeights(perceptual=0.0), steps=4, batch_size=4,
        micro_batch_size=4, adapter_inner_dim=64, lora_rank=2, checkpoint_every=2, num_validated=2,
    )  # fmt: skip
    values = {"name": NAME, "data": world.config(), "training": training, "workers": TrainWorkersConfig(num_workers=1)}
    return values | changes


def test_a_dry_run_says_what_it_takes_and_starts_nothing(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(own_world.settings.home))
    report = finetune(**parameters(own_world, dry_run=True))
    assert report.finetuned is None
    assert (report.plan.num_rows, report.plan.num_held_out, report.plan.steps) == (8, 2, 4)
    assert not Path(own_world.settings.training_of(NAME)).exists()
