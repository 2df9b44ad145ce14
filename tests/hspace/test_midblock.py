"""Fusing and encoding inside the UNet's own forward."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.testing import CompileCounter

from imagerag.errors import UserError
from imagerag.hspace import split
from imagerag.hspace.fusion import Fusion, SlerpFusion
from imagerag.hspace.midblock import encode, fusing, prepare
from tests.generation.folders import small_unet

SMALL = small_unet() | {
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (32,), "attention_head_dim": 2, "layers_per_block": 1,
}  # fmt: skip

SAMPLE, TEXT, STEP = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32), torch.tensor(999)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    made = UNet2DConditionModel(**SMALL).eval().requires_grad_(False)
    prepare(made)
    return made


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def reference(seed: int, size: int = 2) -> Fusion:
    h = torch.randn(size, 1, 32, 8, 8, generator=torch.Generator().manual_seed(seed))
    return SlerpFusion(h, torch.ones(size, 1), 0.3)


def predict(unet: Any, sample: torch.Tensor = SAMPLE, text: torch.Tensor = TEXT) -> torch.Tensor:
    prediction: torch.Tensor = unet(sample, STEP, text).sample
    return prediction


def by_halves(unet: UNet2DConditionModel, fusion: Fusion) -> torch.Tensor:
    """The same by the two halves of the UNet that training runs."""
    target = split.encode(unet, SAMPLE, STEP, TEXT)
    return split.decode(unet, replace(target, h=fusion(target.h)))


def test_it_fuses_before_the_decoder_and_changes_nothing_else(unet: UNet2DConditionModel) -> None:
    plain = UNet2DConditionModel(**SMALL).eval()
    plain.load_state_dict(unet.state_dict())
    assert torch.equal(predict(unet), predict(plain))
    with fusing(unet, reference(0), 2):
        assert torch.equal(predict(unet), by_halves(plain, reference(0)))
        with fusing(unet, reference(1), 2):
            assert torch.equal(predict(unet), by_halves(plain, reference(1))), "contexts nest"
        with fusing(unet, None, 2):
            assert torch.equal(predict(unet), predict(plain))
        assert torch.equal(predict(unet), by_halves(plain, reference(0)))
    assert torch.equal(predict(unet), predict(plain))


def test_of_a_batch_that_guidance_doubles_the_half_with_text_is_fused(unet: UNet2DConditionModel) -> None:
    doubled = [torch.cat([each, each]) for each in (SAMPLE, TEXT)]
    with fusing(unet, reference(0), 2):
        without, with_text = predict(unet, *doubled).chunk(2)
        fused = predict(unet)
    assert torch.allclose(without, predict(unet), atol=1e-5)
    assert torch.allclose(with_text, fused, atol=1e-5)


def test_threads_that_share_a_unet_have_references_of_their_own(unet: UNet2DConditionModel) -> None:
    both = threading.Barrier(2)
    made: dict[int, torch.Tensor] = {}

    def run(seed: int) -> None:
        with torch.no_grad(), fusing(unet, reference(seed), 2):
            both.wait()
            made[seed] = predict(unet)
            both.wait()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(made[0], by_halves(unet, reference(0)))
    assert torch.equal(made[1], by_halves(unet, reference(1)))


def test_encoding_ends_after_the_mid_block(unet: UNet2DConditionModel) -> None:
    decoded: list[int] = []
    unet.up_blocks[0].register_forward_hook(lambda *_: decoded.append(1))
    with fusing(unet, reference(0), 2):
        h = encode(unet, SAMPLE, 0, encoder_hidden_states=TEXT)
        assert not decoded
        predict(unet)
    assert torch.equal(h, split.encode(unet, SAMPLE, 0, TEXT).h), "and nothing is fused"


def test_a_compiled_unet_is_one_graph_that_fuses_what_each_call_has(unet: UNet2DConditionModel) -> None:
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    assert torch.equal(predict(compiled), predict(unet))
    for seed in range(3):
        expected = by_halves(unet, reference(seed))
        with fusing(compiled, reference(seed), 2):
            assert torch.equal(predict(compiled), expected)
    assert torch.equal(predict(compiled), predict(unet))
    assert counter.frame_count == 1
    assert torch.equal(encode(compiled, SAMPLE, 0, encoder_hidden_states=TEXT), split.encode(unet, SAMPLE, 0, TEXT).h)
    assert counter.frame_count == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("fusion", [None, reference(0), replace(reference(0), w=1.0)])
def test_the_operator_returns_what_it_promises_the_compiler(
    fusion: Fusion | None, size: int, memory_format: torch.memory_format
) -> None:
    h = torch.randn(size, 32, 8, 8).to(memory_format=memory_format)
    change = torch.ops.imagerag.change_h
    with fusing(UNet2DConditionModel(**SMALL), fusion, 2):
        torch.library.opcheck(change, (h,))
        changed = change(h)
    assert changed.stride() == h.stride()
    assert torch.equal(changed[-2:], h[-2:] if fusion is None else fusion(h[-2:]))


def test_a_unet_without_a_mid_block_is_refused() -> None:
    unet = UNet2DConditionModel(**SMALL | {"mid_block_type": None})
    assert predict(unet).isfinite().all(), "diffusers runs it"
    with pytest.raises(UserError, match="a base model's UNet needs one; this one's mid_block_type is None"):
        prepare(unet)


def test_a_graph_that_knows_no_references_is_refused() -> None:
    unet = UNet2DConditionModel(**SMALL).eval().requires_grad_(False)
    compiled = torch.compile(unet, backend="eager")
    predict(compiled)  # without the hook
    with pytest.raises(UserError, match="traced it, or one like it, before"), fusing(unet, reference(0), 2):
        predict(compiled)
