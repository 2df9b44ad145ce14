from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from imagerag.hspace.split import decode, encode
from imagerag.recipes.tiny_base.teacher import build_unet

SMALL: dict[str, Any] = {"block_out_channels": (32, 64), "norm_num_groups": 8, "cross_attention_dim": 32}
UNETS: dict[str, dict[str, Any]] = {
    "sd-1": SMALL
    | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
    },
    "sd-2": SMALL
    | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    },
    "sdxl": SMALL
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
    "lcm": SMALL
    | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "time_cond_proj_dim": 16,
    },
}


def _unet(name: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return (build_unet() if name == "tiny" else UNet2DConditionModel(**UNETS[name])).eval()


def _extras(name: str) -> dict[str, Any]:
    if name == "sdxl":
        return {"added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)}}
    return {"timestep_cond": torch.randn(2, 16)} if name == "lcm" else {}


@pytest.mark.parametrize("side", [16, 18, 7])
@pytest.mark.parametrize("name", [*UNETS, "tiny"])
@torch.inference_mode()
def test_the_halves_are_the_unet_bit_for_bit(name: str, side: int) -> None:
    unet, extras = _unet(name), _extras(name)
    sample, text = torch.randn(2, 4, side, side), torch.randn(2, 7, unet.config.cross_attention_dim)
    seen: list[torch.Tensor] = []
    hook = unet.mid_block.register_forward_hook(lambda _, __, output: seen.append(output))
    expected = unet(sample, torch.tensor([999, 3]), text, **extras).sample
    hook.remove()
    encoded = encode(unet, sample, torch.tensor([999, 3]), text, **extras)
    assert torch.equal(encoded.h, seen[0])
    assert torch.equal(decode(unet, encoded), expected)
