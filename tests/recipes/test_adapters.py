"""The measures of adapters on the shipped base model, on some held-out drawings that are their own references."""

from typing import Any

import numpy as np
import pytest
import torch

from imagerag.base.model import BaseModel, load_base
from imagerag.embedded.sample import Drawing, load_drawings
from imagerag.evaluation.intervals import estimate
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.hspace.encode import encode_latents, encode_references, open_images
from imagerag.recipes.tiny_base import adapters
from imagerag.recipes.tiny_base.adapters import Maker, Report, choose_w
from imagerag.recipes.tiny_base.measure import NONE, ONE, RIGHT, Judges, Measurer
from imagerag.training.config import ReferenceChoice
from imagerag.training.data import Ints, RagBatch

STYLES = ("noto", "twemoji", "fluent-3d")


class InMemoryData:
    """What `RagData` reads from tables: drawings, whose references are those of their concepts in other styles."""

    def __init__(self, drawings: list[Drawing], base: BaseModel) -> None:
        self._prompts = [drawing.concept.name for drawing in drawings]
        self.held_out, self.learnt = np.arange(len(drawings)), np.empty(0, int)
        self._images = [drawing.image for drawing in drawings]
        pictures = open_images(self._images)
        self._latents = encode_latents(base.vae, base.unet, pictures, "crop")
        self._text = base.conditioner.encode(self._prompts).embeds
        self._h = encode_references(base.vae, base.unet, base.conditioner, pictures, self._prompts, "crop")
        names = np.array(self._prompts)
        others = [np.flatnonzero(names == name) for name in self._prompts]
        self._others = np.array([np.resize(own[own != row], 2) for row, own in enumerate(others)])

    def images(self) -> list[bytes]:
        return self._images

    def prompts(self, examples: Ints) -> list[str]:
        return [self._prompts[example] for example in examples]

    def own(self, examples: Ints) -> Ints:
        return examples

    def choose(self, examples: Ints, choice: ReferenceChoice, rng: np.random.Generator) -> Ints:
        rows = np.full((len(examples), choice.number), -1)
        rows[:, :2] = self._others[examples][:, : choice.number]
        return rows if choice.none == 0 else np.full_like(rows, -1)

    def read(self, examples: Ints, choice: ReferenceChoice, rng: np.random.Generator) -> RagBatch:
        rows = self.choose(examples, choice, rng)
        similarities = torch.where(torch.from_numpy(rows) >= 0, 1.0, -1.0)
        latents = self._latents[examples]
        return RagBatch(latents, torch.zeros_like(latents), self._text[examples], self._h[rows], similarities)


@pytest.fixture(scope="module")
def world() -> tuple[Any, Judges, Measurer, BaseModel]:
    base = load_base("tiny", "cpu")
    drawings = load_drawings(STYLES, ["held_out"])
    names = {name for name in {d.concept.name for d in drawings} if sum(d.concept.name == name for d in drawings) == 3}
    some = [drawing for drawing in drawings if drawing.concept.name in sorted(names)[:102]]
    data: Any = InMemoryData(some, base)
    judges = Judges(some)
    return data, judges, Measurer.of_split(data, judges, "held_out", per_concept=1), base


def test_all_ways_are_judged_with_the_same_drawings_left_out(world: tuple[Any, Judges, Measurer, BaseModel]) -> None:
    data, _, measurer, base = world
    real = data.read(measurer.examples, NONE, np.random.default_rng(0)).latents
    rows = [measurer.measure("", [real], base, shown and [measurer.shown(shown, 0)]) for shown in (None, ONE, RIGHT)]
    assert len({each.recognised for each in rows}) == 1, "the same pictures are worth the same, whatever was shown"
    assert rows[0].copies is None
    assert rows[1].recognised.mean > 0.3
    assert rows[1].recognised_second.mean > 0.3


def test_a_reference_handed_on_is_a_copy_and_the_base_model_makes_none(
    world: tuple[Any, Judges, Measurer, BaseModel],
) -> None:
    data, _, measurer, base = world
    maker = Maker(measurer, base)
    copied = maker.references(data)
    assert copied.shown is not None
    copy = measurer.measure(copied.title, copied.made, base, copied.shown)
    plain = maker.way("base", [(base, None)], NONE)
    assert plain.shown is None
    original = measurer.measure("base", plain.made, base, copied.shown)
    assert copy.copies is not None
    assert original.copies is not None
    assert copy.copies.mean > 0.6 > 0.1 > original.copies.mean
    assert copy.recognised.mean > original.recognised.mean + 0.2
    assert copy.disputed


def test_w_is_chosen_and_copies_follow_the_settings(
    world: tuple[Any, Judges, Measurer, BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, judges, measurer, base = world
    for name, values in (("FIXED_WS", (0.8, 0.0)), ("SCALES", (1.0,)), ("VALIDATED_WS", (0.9, 0.1))):
        monkeypatch.setattr(adapters, name, values)
    adapter = HSpaceAdapter(base.unet.config.block_out_channels[-1]).eval()
    points = adapters._copies(measurer, Maker(measurer, base), base, {"adapter": (base, adapter)})
    by_setting = {(each.curve, each.setting): each.row for each in points}
    far, near = (by_setting["slerp, references in other styles", f"w = {w}"] for w in (0.8, 0.0))
    assert far.nearest is not None
    assert near.nearest is not None
    assert far.nearest.high < near.nearest.low, "the less of the base, the nearer to the reference"
    itself = by_setting["slerp, the drawing itself among the references", "w = 0.0"]
    assert itself.latent_error.high < near.latent_error.low
    report = Report(
        rows=(near,), best_w=0.1, gains={"adapter, 1 reference": estimate([0.1, 0.2] * 30)}, copies=tuple(points)
    )
    assert "adapter, 1 reference minus slerp with that w, paired by concept: 0.150" in report.markdown()
    assert report.curves().count("<polyline") == 4
    monkeypatch.setattr(adapters, "_VALIDATION_SPLIT", "held_out")
    assert choose_w(data, judges, base) == 0.1
