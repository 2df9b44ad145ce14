import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imagerag.embedded import tiny_encoder
from imagerag.embedded.sample import load_drawings
from imagerag.recipes.tiny_encoder import train
from imagerag.recipes.tiny_encoder.train import Recipe, Samples

RECIPE = Recipe(steps=4, batch_size=6, warmup_steps=2)
PLAIN = Recipe(degrees=0, scale=0, shift=0, jitter=0)
BASE = load_drawings(["noto", "twemoji"], ["base"])
DRAWINGS = [drawing for drawing in BASE if drawing.concept in [other.concept for other in BASE[:12]]]


def rates(recipe: Recipe) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule = recipe.schedule(optimizer)
    found = []
    for _ in range(recipe.steps):
        found += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return found


def test_a_warm_up_of_no_steps_begins_at_the_peak() -> None:
    decay = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates(replace(RECIPE, warmup_steps=0)) == pytest.approx(decay)
    assert rates(RECIPE) == pytest.approx([0.5, *decay[1:]])


def test_a_stopped_run_goes_on_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train.train(RECIPE, DRAWINGS, tmp_path).state_dict()
    assert not (tmp_path / "checkpoint.pt").exists()

    class StopError(Exception):
        pass

    batch = Samples.batch

    def stop(samples: Samples, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 3:
            raise StopError
        return batch(samples, step)

    monkeypatch.setattr(Samples, "batch", stop)
    with pytest.raises(StopError):
        train.train(RECIPE, DRAWINGS, tmp_path, checkpoint_every=2)
    monkeypatch.undo()
    resumed = train.train(RECIPE, DRAWINGS, tmp_path).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    other = train.train(replace(RECIPE, seed=1), DRAWINGS, tmp_path).state_dict()
    assert not torch.equal(other["visual.conv1.weight"], whole["visual.conv1.weight"])
    text = tiny_encoder.build_model().text.state_dict()
    assert all(torch.equal(value, whole[f"text.{name}"]) for name, value in text.items())


def test_a_batch_holds_a_concept_once() -> None:
    samples = Samples(RECIPE, DRAWINGS, tiny_encoder.build_model())
    assert len(samples.codepoints) < len(DRAWINGS)
    images, texts = samples.batch(0)
    assert images.shape == (6, 3, 64, 64)
    assert texts.shape == (6, 384)
    assert (texts @ texts.T).triu(1).max() < 0.99
    again = samples.batch(0)
    assert torch.equal(images, again[0])
    assert torch.equal(texts, again[1])
    assert not torch.equal(images, samples.batch(1)[0])


def test_without_augmentation_images_are_only_normalised_and_mirrored() -> None:
    pixels = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = pixels / 127.5 - 1
    augmented = PLAIN.augment(pixels, torch.Generator().manual_seed(0))
    kept = torch.isclose(augmented, expected, atol=1e-4).all((1, 2, 3))
    mirrored = torch.isclose(augmented, expected.flip(3), atol=1e-4).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 16 < kept.sum() < 48


def test_augmentation_keeps_white_paper() -> None:
    white = torch.full((32, 3, 64, 64), 255, dtype=torch.uint8)
    assert torch.allclose(Recipe().augment(white, torch.Generator().manual_seed(0)), torch.ones(()), atol=1e-5)


def test_mixing_blends_neighbours() -> None:
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mixed = train.mix(values, torch.tensor([1.0, 0.75]))
    assert torch.allclose(mixed, torch.tensor([[1.0, 0.0], [0.25, 0.75]]))


def test_a_bad_loss_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = torch.full((6, 3, 64, 64), math.nan), torch.zeros(6, 384)
    monkeypatch.setattr(Samples, "batch", lambda *_: nothing)
    with pytest.raises(RuntimeError, match=r"the loss of step 0 is nan with Recipe\(seed=0, steps=4"):
        train.train(RECIPE, DRAWINGS, tmp_path)
    assert json.loads((tiny_encoder.FOLDER / tiny_encoder.CONFIG_NAME).read_text())["model_cfg"]["embed_dim"] == 384
