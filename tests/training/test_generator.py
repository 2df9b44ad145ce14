"""The generator with references, as it is trained."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from imagerag.generation.base import BaseModel, load_base
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.training.diffusion import Diffusion
from imagerag.training.generator import Generator
from imagerag.training.rag_data import RagBatch, RagRows, ReferenceChoice
from tests.generation.folders import write_sd

NUM_ROWS, NUM_REFERENCES = 12, 2


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


def make_rows(held_out: int = 2) -> RagRows:
    """Rows whose features say which they are; each is referred to the two that follow it."""
    torch.manual_seed(0)
    trained = np.arange(NUM_ROWS - held_out)
    following = (np.arange(NUM_ROWS)[:, None] + np.arange(1, NUM_REFERENCES + 1)) % len(trained)
    numbers = torch.arange(NUM_ROWS).view(-1, 1, 1, 1)
    return RagRows(
        captions=tuple(map(str, range(NUM_ROWS))),
        latents=torch.randn(NUM_ROWS, 4, 8, 8),
        text=torch.randn(NUM_ROWS, 77, 32),
        text_of=np.arange(NUM_ROWS),
        h=numbers.expand(NUM_ROWS, 64, 4, 4).half(),
        embeds=torch.nn.functional.normalize(torch.randn(NUM_ROWS, 8), dim=1),
        references=following,
        trained=trained,
    )


def draw(rows: RagRows, size: int = 64, **choice: float) -> RagBatch:
    return rows.draw(size, ReferenceChoice(number=NUM_REFERENCES, **choice), np.random.default_rng(0))


def test_before_training_it_is_the_student(base: BaseModel, make: Callable[..., Generator]) -> None:
    batch = draw(make_rows(), 3, none=0.0, random=0.0)
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
    generator(draw(make_rows(), 2)).sum().backward()
    assert seen == [False, False, True]
    assert generator.adapter.to_out.weight.grad is not None


def test_no_row_is_its_own_reference() -> None:
    rows = make_rows()
    for seed in range(50):
        chosen = np.random.default_rng(seed).choice(rows.trained, 32)
        choice = ReferenceChoice(number=NUM_REFERENCES, random=1.0, none=0.0)
        batch = rows.batch(chosen, choice, np.random.default_rng(seed))
        same = batch.h_references[:, :, 0, 0, 0] == torch.from_numpy(chosen)[:, None]
        assert (batch.similarities[same] == -1).all()


def test_the_shares_are_what_was_asked_for() -> None:
    batch = draw(make_rows(), 4_000, none=0.25, random=0.5)
    none = (batch.similarities == -1).all(1)
    assert none.float().mean() == pytest.approx(0.25, abs=0.04)


def test_held_out_rows_are_never_drawn() -> None:
    rows = make_rows(held_out=2)
    batch = draw(rows, 500, none=0.0, random=0.5)
    assert batch.h_references[:, :, 0, 0, 0].max() < NUM_ROWS - 2
    known = rows.latents[rows.trained].flatten(1)
    assert (batch.latents.flatten(1)[:, None] == known).all(2).any(1).all()


def test_similarities_are_cosines_with_the_rows_own_caption() -> None:
    rows = make_rows()
    chosen = np.array([3, 4])
    choice = ReferenceChoice(number=NUM_REFERENCES, random=0.0, none=0.0)
    batch = rows.batch(chosen, choice, np.random.default_rng(0))
    assert torch.allclose(batch.similarities[0], rows.embeds[[4, 5]] @ rows.embeds[3], atol=1e-6)
    assert batch.h_references[0, :, 0, 0, 0].tolist() == [4, 5]
