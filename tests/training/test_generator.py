"""The generator with references, as it is trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imagerag.base.model import BaseModel, load_base
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.training.data import RagBatch
from imagerag.training.diffusion import Diffusion
from imagerag.training.generator import Generator
from tests.generation.folders import write_sd

NUM_REFERENCES = 2


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_base(str(write_sd(tmp_path)), device="cpu")


@pytest.fixture
def make(base: BaseModel) -> Callable[..., Generator]:
    def generator(lora_rank: int = 2) -> Generator:
        torch.manual_seed(0)
        adapter = HSpaceAdapter(channels=64, inner_dim=64, num_heads=2)
        return Generator(base.unet, adapter, Diffusion(base.scheduler), lora_rank=lora_rank)

    return generator


def make_batch(size: int = 3) -> RagBatch:
    random = torch.Generator().manual_seed(0)
    return RagBatch(
        latents=torch.randn(size, 4, 8, 8, generator=random),
        noise=torch.randn(size, 4, 8, 8, generator=random),
        text=torch.randn(size, 77, 32, generator=random),
        h_references=torch.randn(size, NUM_REFERENCES, 64, 4, 4, generator=random),
        similarities=torch.rand(size, NUM_REFERENCES, generator=random),
    )


def test_before_training_it_is_the_student(base: BaseModel, make: Callable[..., Generator]) -> None:
    batch = make_batch()
    diffusion = Diffusion(base.scheduler)
    last = torch.full((3,), diffusion.last)
    noised = diffusion.add_noise(torch.zeros_like(batch.noise), batch.noise, last)
    with torch.no_grad():
        expected = diffusion.to_clean(base.unet(noised, last, batch.text).sample, noised, last)
        assert torch.allclose(make()(batch), expected, atol=1e-4 * float(expected.abs().max()))


def test_only_adapter_and_lora_of_the_decoder_learn(make: Callable[..., Generator]) -> None:
    names = [name for name, _ in make().learning()]
    parts = {"adapter" if name.startswith("adapter.") else name.split(".")[1] for name in names}
    assert parts == {"adapter", "up_blocks"}
    assert all("lora_" in name for name in names if not name.startswith("adapter."))


def test_without_lora_only_the_adapter_learns(make: Callable[..., Generator]) -> None:
    assert all(name.startswith("adapter.") for name, _ in make(lora_rank=0).learning())


def test_the_encoder_keeps_no_activations(base: BaseModel, make: Callable[..., Generator]) -> None:
    generator = make()
    seen: list[bool] = []
    for part in (base.unet.down_blocks[0], base.unet.mid_block, base.unet.up_blocks[0]):
        part.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    generator(make_batch()).sum().backward()
    assert seen == [False, False, True]
    assert generator.adapter.to_out.weight.grad is not None
