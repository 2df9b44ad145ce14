from collections.abc import Callable
from typing import Literal

import pytest
import torch
from diffusers import UNet2DConditionModel

from imagerag.recipes.tiny_base.teacher import build_scheduler, build_unet
from imagerag.training.config import LossWeights
from imagerag.training.diffusion import Diffusion
from imagerag.training.discriminator import Head, build_discriminator, discriminator_loss, generator_loss
from imagerag.training.ladd import Ladd
from imagerag.training.perceptual import LatentDistance, LatentNetwork

TEXT = torch.randn(8, 5, 384, generator=torch.Generator().manual_seed(1))


def _ladd(kind: Literal["teacher", "latents"]) -> Ladd:
    torch.manual_seed(0)
    diffusion = Diffusion(build_scheduler())
    perceptual = LatentDistance(LatentNetwork(4, channels=(8, 16)), "small")
    discriminator = build_discriminator(kind, build_unet(), diffusion)
    return Ladd(discriminator, diffusion, perceptual=perceptual, max_timestep=600)


@pytest.fixture
def ladd() -> Ladd:
    return _ladd("teacher")


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, fake) == pytest.approx(0.25 + 0.5)
    assert generator_loss(fake) == pytest.approx(1.5)


def test_a_head_has_one_logit_per_position() -> None:
    assert Head(8, 4)(torch.zeros(2, 8, 5, 3), torch.zeros(2, 4)).shape == (2, 5 * 3)


def test_only_the_heads_learn(ladd: Ladd) -> None:
    teacher: UNet2DConditionModel = ladd.discriminator._teacher[0]
    latents = torch.randn(2, 8, 4, 16, 16)
    fake = latents[0].clone().requires_grad_()
    loss, terms = ladd.of_discriminator(fake, latents[1], TEXT, _random())
    assert terms.keys() == {"discriminator", "accuracy"}
    loss.backward()
    assert fake.grad is None, "the discriminator's loss must not train the generator"
    assert all(parameter.grad is not None for parameter in ladd.discriminator.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(name.startswith("_teacher") for name in ladd.discriminator.state_dict())

    ladd.discriminator.zero_grad()
    loss, _ = ladd.of_generator(fake, latents[1], TEXT, _random(), LossWeights())
    loss.backward()
    assert fake.grad is not None
    assert fake.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in ladd.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in ladd.discriminator.parameters())


@pytest.mark.parametrize(
    "names", [set(), {"adversarial"}, {"distillation"}, {"perceptual"}, set(LossWeights.model_fields)]
)
def test_each_term_can_be_switched_off(ladd: Ladd, names: set[str]) -> None:
    weights = LossWeights(**{name: float(name in names) * 1.5 for name in LossWeights.model_fields})
    fake, real = torch.randn(2, 8, 4, 16, 16)
    loss, values = ladd.of_generator(fake, real, TEXT, _random(), weights)
    assert values.keys() == names
    expected = sum(getattr(weights, name) * float(value) for name, value in values.items())
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)


def _accuracy(ladd: Ladd, make: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share of 64 unseen pairs that it puts in the right order."""
    right = 0.0
    for seed in range(10_000, 10_008):
        real, fake = make(seed)
        noise, timesteps = torch.zeros_like(real), torch.zeros(len(real), dtype=torch.long)
        with torch.no_grad():
            scores = [ladd.discriminator(each, noise, timesteps, TEXT).mean(1) for each in (real, fake)]
        right += float((scores[0] > scores[1]).float().mean())
    return right / 8


@pytest.mark.parametrize("kind", ["teacher", "latents"])
@pytest.mark.parametrize("different", [True, False])
def test_it_tells_apart_what_is_different_and_nothing_else(
    kind: Literal["teacher", "latents"], different: bool
) -> None:
    """Over four seeds: 1.00 where smooth latents are to be told from rough ones, 0.36 to 0.56 where both are rough."""
    ladd = _ladd(kind)

    def make(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        rough = torch.randn(2, 8, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        smooth = torch.nn.functional.avg_pool2d(rough[0], 3, 1, 1) * 3
        return (smooth if different else rough[0]), rough[1]

    optimizer = torch.optim.Adam(ladd.discriminator.parameters(), 2e-3 if kind == "teacher" else 5e-4)
    for seed in range(20):
        real, fake = make(seed)
        optimizer.zero_grad()
        ladd.of_discriminator(fake, real, TEXT, torch.Generator().manual_seed(seed))[0].backward()
        optimizer.step()
    accuracy = _accuracy(ladd, make)
    assert accuracy >= 0.95 if different else 0.25 < accuracy < 0.75


def test_it_trains_on_channels_last_features(ladd: Ladd) -> None:
    """GroupNorm's backward crashes on such features where they need no gradient (torch 2.13 on the CPU)."""
    latents = torch.randn(2, 8, 4, 16, 16)
    one, other = (each.to(memory_format=torch.channels_last) for each in latents)
    ladd.discriminator._teacher[0].to(memory_format=torch.channels_last)
    ladd.of_discriminator(one, other, TEXT, _random())[0].backward()
