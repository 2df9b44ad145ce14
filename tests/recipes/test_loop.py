from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imagerag.recipes import loop
from imagerag.settings import Settings
from imagerag.training.tracking import mlflow_client, tracked, tracking_uri


class Line:
    """A phase that fits a line; one step needs nothing but its index."""

    name = "line"

    def __init__(self, steps: int = 40, rate: float = 0.1) -> None:
        torch.manual_seed(0)
        self.steps = steps
        self.recipe: dict[str, Any] = {"steps": steps, "rate": rate}
        self.model = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), rate)
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)
        self.done: list[int] = []

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def step(self, index: int) -> dict[str, float]:
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(index))
        loss = (self.model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.done.append(index)
        return {"loss": float(loss.detach())}

    def grid(self) -> Image.Image:
        return Image.new("RGB", (4, 4))


class Kept:
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.images: list[str] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.losses[step] = values["line/loss"]

    def image(self, name: str, image: Image.Image) -> None:
        self.images.append(name)


def test_a_stopped_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, kept = Line(), Kept()
    (tmp_path / "undisturbed").mkdir()
    loop.run(undisturbed, tmp_path / "undisturbed", kept)
    assert kept.losses.keys() == {25, 40}
    assert kept.images == [f"line/{step:06d}.png" for step in range(4, 41, 4)]

    stopped = Line()
    step = stopped.step
    monkeypatch.setattr(stopped, "step", lambda index: step(index) if index < 20 else pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        loop.run(stopped, tmp_path, Kept(), checkpoint_every_s=0)
    resumed = Line()
    loop.run(resumed, tmp_path, Kept())
    assert resumed.done == list(range(20, 40))
    assert torch.equal(resumed.model.weight, undisturbed.model.weight)

    again = Line()
    loop.run(again, tmp_path, Kept())
    assert again.done == [], "what is finished is not done again"
    assert torch.equal(again.model.weight, undisturbed.model.weight)


def test_a_checkpoint_of_another_recipe_is_not_continued(tmp_path: Path) -> None:
    loop.run(Line(steps=10), tmp_path, Kept())
    other = Line(steps=10, rate=0.2)
    loop.run(other, tmp_path, Kept())
    assert other.done == list(range(10))


def test_another_training_starts_with_the_state_of_a_finished_one(tmp_path: Path) -> None:
    first, second = Line(), Line(rate=0.05)
    loop.run(first, tmp_path, Kept())
    loop.start_from(second, tmp_path / "line.checkpoint")
    assert torch.equal(second.model.weight, first.model.weight)
    moments = [each.optimizer.state_dict()["state"][0]["exp_avg_sq"] for each in (first, second)]
    assert torch.equal(*moments)
    assert second.schedule.last_epoch == 0


def test_a_loss_that_is_no_number_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line()
    monkeypatch.setattr(line, "step", lambda index: {"loss": float("nan") if index == 3 else 1.0})
    with pytest.raises(FloatingPointError, match=r"step 3 of line: \{'loss': nan\} with .*'rate': 0.1"):
        loop.run(line, tmp_path, Kept())


def test_mlflow_keeps_curves_and_pictures(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    client = mlflow_client(tracking_uri(settings))
    with tracked(settings, "tiny", "run", {"rate": 0.1}) as tracker:
        loop.run(Line(), tmp_path, tracker)
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rate": "0.1"}
    history = client.get_metric_history(run.info.run_id, "line/loss")
    assert [metric.step for metric in history] == [25, 40]
    assert history[-1].value < history[0].value
    assert len(client.list_artifacts(run.info.run_id, "line")) == 10
