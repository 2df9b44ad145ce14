"""A step of fine-tuning, and what it leaves."""

import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagerag.artifacts import TrainingSet
from imagerag.base.model import load_base
from imagerag.generation.finetuned import ADAPTER, load_finetuned
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.storage.hexadecimal import to_hex
from imagerag.training.config import FinetuneConfig, LossWeights, ReferenceChoice, describe_accuracy
from imagerag.training.data import RagData
from imagerag.training.loader import Loaded, Loader
from imagerag.training.perceptual import LatentDistance, LatentNetwork
from imagerag.training.scale import SCALES
from imagerag.training.trainer import Finetuning
from tests.devices import DEVICES
from tests.training.conftest import World

CPU = torch.device("cpu")
NO_PERCEPTUAL = LossWeights(perceptual=0.0)
TERMS = {"adversarial", "distillation", "perceptual"}


def make_config(**changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "references": ReferenceChoice(number=2, own=0.4, own_among=0.1, none=0.1, random=0.2),
        "steps": 8, "batch_size": 4, "micro_batch_size": 4, "warmup_steps": 1, "adapter_inner_dim": 64, "lora_rank": 2,
        "learning_rate": 1e-2, "heads_learning_rate": 1e-3, "ema_decay": 0.5, "num_validated": 2,
    }  # fmt: skip
    return FinetuneConfig(**values | changes)


@pytest.fixture
def data(world: World, training_set: TrainingSet) -> RagData:
    return world.data(training_set)


@pytest.fixture
def make(world: World) -> Callable[..., Finetuning]:
    def finetuning(**changes: Any) -> Finetuning:
        torch.manual_seed(7)
        perceptual = LatentDistance(LatentNetwork(4, channels=(8, 16), embed_dim=8), "small")
        base, teacher = load_base(world.base, "cpu"), load_base(world.base, "cpu").unet
        return Finetuning(base, teacher, perceptual, make_config(**changes))

    return finetuning


def run(
    training: Finetuning, data: RagData, until: int | None = None, device: torch.device = CPU
) -> list[dict[str, float]]:
    values = []
    for loads in Loader(data, training.config, device).steps(training.done):
        if training.done == until:
            break
        values.append(training.step(loads))
    return values


def learnt(training: Finetuning) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in training.generator.learning()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance: float) -> bool:
    close = torch.equal if not tolerance else lambda a, b: torch.allclose(a, b, **tolerance)
    return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)


def test_a_step_tells_of_every_term(make: Callable[..., Finetuning], data: RagData) -> None:
    (values,) = run(make(), data, until=1)
    more = {"discriminator", "accuracy", "grad_norm", "heads_grad_norm", "learning_rate", "data_s", "step_s", "skipped"}
    assert values.keys() == TERMS | more
    assert 0 <= values["accuracy"] <= 1
    assert 0 <= values["data_s"] <= values["step_s"]


@pytest.mark.parametrize("term", sorted(TERMS))
def test_each_term_can_be_switched_off(make: Callable[..., Finetuning], data: RagData, term: str) -> None:
    (values,) = run(make(losses=LossWeights(**{term: 0.0})), data, until=1)
    assert TERMS - values.keys() == {term}
    assert ("discriminator" in values) == (term != "adversarial")


@pytest.mark.parametrize("kind", ["teacher", "latents"])
def test_how_often_the_discriminator_is_right_is_averaged_and_kept(
    make: Callable[..., Finetuning], data: RagData, kind: str
) -> None:
    training = make(discriminator=kind)
    assert math.isnan(training.accuracy)
    expected = 0.5
    for values in run(training, data, until=4):
        expected = 0.95 * expected + 0.05 * values["accuracy"]
    assert training.accuracy == pytest.approx(expected)
    again = make(discriminator=kind)
    again.load_state_dict(training.state_dict())
    assert again.accuracy == training.accuracy


def test_a_discriminator_at_chance_is_called_one() -> None:
    assert describe_accuracy(0.52) == "accuracy 0.52, which is chance: the adversarial loss had no effect"
    assert describe_accuracy(0.71) == "accuracy 0.71"


def test_the_adversarial_loss_joins_when_it_is_told_to(make: Callable[..., Finetuning], data: RagData) -> None:
    values = run(make(adversarial_share=0.25), data)
    assert ["adversarial" in each for each in values] == [False] * 6 + [True] * 2


def test_it_learns(make: Callable[..., Finetuning], data: RagData) -> None:
    """Each row was seen dozens of times: it must be far nearer to them than before."""
    changes = {"losses": LossWeights(adversarial=0.0, perceptual=0.0), "steps": 150, "batch_size": 8}
    training = make(**changes, micro_batch_size=8, lora_rank=8)
    values = [each["distillation"] for each in run(training, data)]
    assert sum(values[-10:]) < 0.7 * sum(values[:10]), (values[:3], values[-3:])


def test_a_training_of_one_step_learns(make: Callable[..., Finetuning], data: RagData) -> None:
    training = make(steps=1, warmup_steps=12)
    before = learnt(training)
    run(training, data)
    assert not same(learnt(training), before)


@pytest.mark.parametrize("kind", ["teacher", "latents"])
def test_accumulated_gradients_are_a_mean(make: Callable[..., Finetuning], data: RagData, kind: str) -> None:
    """The same micro-batch twice is as good as once, for the generator and for what judges it, in every step."""
    one, other = (make(discriminator=kind, micro_batch_size=2, batch_size=2) for _ in range(2))
    for (load,), _ in zip(Loader(data, one.config, CPU).steps(0), range(3), strict=False):
        once, twice = one.step([load]), other.step([load, load])
        for name in (*TERMS, "discriminator", "grad_norm", "heads_grad_norm"):
            assert twice[name] == pytest.approx(once[name], rel=1e-4), name
    heads, other_heads = (training.state_dict()["heads"] for training in (one, other))
    assert any(name.endswith("_u") for name in heads)
    assert same(heads, other_heads, rtol=1e-3, atol=1e-5)


def test_a_step_holds_one_micro_batch_at_a_time(make: Callable[..., Finetuning], data: RagData) -> None:
    """Else gradient accumulation would not bound the device's memory."""
    training = make(micro_batch_size=1)
    references: list[weakref.ref[torch.Tensor]] = []

    def load(number: int) -> Loaded:
        assert not any(each() is not None for each in references)
        rows = data.learnt[number : number + 1]
        batch = data.read(rows, training.config.references, np.random.default_rng(number))
        references.append(weakref.ref(batch.h_references))
        return Loaded(batch, number, 0.0, rows)

    training.step([partial(load, number) for number in range(4)])
    assert len(references) == 4


def test_it_goes_on_where_it_was_bit_for_bit(make: Callable[..., Finetuning], data: RagData, tmp_path: Path) -> None:
    whole = make()
    expected = run(whole, data)
    first = make()
    run(first, data, until=3)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make(seed=0)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.done == 3
    values = run(second, data)
    for one, other in zip(values, expected[3:], strict=True):
        assert {n: v for n, v in one.items() if not n.endswith("_s")} == {
            n: v for n, v in other.items() if not n.endswith("_s")
        }
    assert same(learnt(second), learnt(whole))
    with second.averaged(), whole.averaged():
        assert same(learnt(second), learnt(whole))


@pytest.mark.parametrize("device", DEVICES)
def test_in_bfloat16_what_learns_stays_float32(world: World, data: RagData, device: str) -> None:
    """What is frozen is bfloat16, and so is what is computed."""
    base, teacher = (load_base(world.base, device, "bf16") for _ in range(2))
    half = Finetuning(base, teacher.unet, None, make_config(losses=NO_PERCEPTUAL), dtype=torch.bfloat16)
    assert {parameter.dtype for _, parameter in half.generator.learning()} == {torch.float32}
    assert base.unet.conv_in.weight.dtype == torch.bfloat16
    torch.manual_seed(7)
    base, teacher = (load_base(world.base, "cpu") for _ in range(2))
    whole = Finetuning(base, teacher.unet, None, make_config(losses=NO_PERCEPTUAL))
    run_half = partial(run, half, data, device=torch.device(device))
    for one, other in zip(run_half(until=3), run(whole, data, until=3), strict=True):
        assert one["distillation"] == pytest.approx(other["distillation"], rel=0.1)
    before = {name: parameter.clone() for name, parameter in half.generator.learning()}
    run_half(until=4)
    assert not same(learnt(half), before)


def test_a_step_whose_gradient_is_no_number_is_skipped(make: Callable[..., Finetuning], data: RagData) -> None:
    training = make(max_skipped=2, micro_batch_size=2)
    run(training, data, until=2)
    before = learnt(training)
    steps = list(Loader(data, training.config, CPU).steps(2))
    whole, broken = (load() for load in steps[0])
    broken.batch.latents[0] = float("nan")
    values = training.step([lambda: whole, lambda: broken])
    assert same(learnt(training), before)
    assert (training.done, training.skipped, values["skipped"]) == (3, 1, 1)
    assert training.suspects.tolist() == broken.examples.tolist()
    (first, *_) = data.describe(training.suspects)
    row = next(each for each in data._index.read(["id", "image_sha256"]).to_pylist() if each["id"].hex() in first)
    assert first == f"row {row['id'].hex()} (image {row['image_sha256'].hex()})"

    again = make(max_skipped=2, micro_batch_size=2)
    again.load_state_dict(training.state_dict())
    with pytest.raises(
        FloatingPointError, match=r"step 3: grad_norm is nan, and 2 steps in a row .*learning_rate=0.01"
    ):
        again.step([lambda: broken])
    assert again.done == 3
    training.step(steps[1])
    assert not same(learnt(training), before)
    assert len(training.suspects) == 0
    training.step([lambda: broken])
    assert (training.done, training.skipped) == (5, 2), "not in a row"


def test_without_references_lora_alone_is_trained(make: Callable[..., Finetuning], data: RagData) -> None:
    training = make(references=ReferenceChoice(number=0))
    before = learnt(training)
    assert not any(name.startswith("adapter.") for name in before)
    run(training, data, until=2)
    assert not same(learnt(training), before)


def test_validation_is_the_same_each_time_and_changes_nothing(make: Callable[..., Finetuning], data: RagData) -> None:
    training = make()
    run(training, data, until=4)
    before = learnt(training)
    values, picture = training.validate(data)
    assert training.validate(data)[0] == values
    assert same(learnt(training), before)
    ways = [f"{term}{way}" for term in ("distillation", "perceptual") for way in ("", "_random", "_none")]
    assert values.keys() == {*ways, "score"}
    assert values["score"] == pytest.approx(2.5 * values["distillation"] + values["perceptual"])
    assert len({values[f"distillation{way}"] for way in ("", "_random", "_none")}) == 3
    assert picture.width > picture.height / 8


def test_the_scale_is_chosen_after_the_last_step_and_exported(
    make: Callable[..., Finetuning], data: RagData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make(steps=2)
    run(training, data, until=1)
    assert "default_scale" not in training.validate(data)[0]
    run(training, data)
    before = learnt(training)
    assert training.validate(data)[0]["default_scale"] in SCALES
    assert same(learnt(training), before)
    monkeypatch.setattr("imagerag.training.scale.best_scale", lambda _: 1.5)
    assert training.validate(data)[0]["default_scale"] == 1.5
    training.export(tmp_path)
    assert HSpaceAdapter.from_pretrained(tmp_path / ADAPTER).config.default_scale == 1.5


def test_what_is_exported_makes_the_same_picture(
    make: Callable[..., Finetuning], data: RagData, world: World, tmp_path: Path
) -> None:
    training = make()
    run(training, data, until=4)
    training.export(tmp_path)
    batch = data.read(data.learnt[:1], ReferenceChoice.found(2), np.random.default_rng(3))
    with training.averaged(), torch.no_grad():
        expected = training.generator(batch)

    base = load_base(world.base, "cpu")
    pipeline = ImageRAGTurboPipeline.from_base(base, load_finetuned(tmp_path, base))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.use_index(world.settings.index_uri, "images")
    row = int(data.learnt[0])
    ids = to_hex(data._index.read(["id"])["id"])
    references = [ids[each] for each in data.places.references[row, :2]]
    (prompt,) = data.prompts(data.learnt[:1])
    made = pipeline(prompt, latents=batch.noise, reference_ids=references, output_type="latent")
    assert torch.allclose(made.images, expected, atol=5e-3 * float(expected.abs().max()))

    plain = ImageRAGTurboPipeline.from_base(load_base(world.base, "cpu"))
    plain.set_progress_bar_config(disable=True)
    without = pipeline(prompt, latents=batch.noise, fusion="none", output_type="latent").images
    # Not bit for bit: a convolution's last digits depend on where in memory its inputs are.
    assert torch.allclose(without, plain(prompt, latents=batch.noise, output_type="latent").images, atol=1e-6)
    assert not torch.allclose(without, made.images, atol=5e-2)
    again = pipeline(prompt, latents=batch.noise, reference_ids=references, output_type="latent")
    assert torch.allclose(again.images, made.images, atol=1e-6), "LoRA is back"
