"""Base models of random weights in the exact formats of well-known ones, small enough to be built by every run."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

logging.disable_progress_bar()

_LENGTH = 77
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def write_sd(folder: Path, *, seed: int = 0, prediction_type: str = "epsilon", **save: Any) -> Path:
    """SD 2.1 and SD-Turbo: one text encoder in OpenCLIP ViT-H's shape, cross-attention at every resolution but one."""
    torch.manual_seed(seed)
    scheduler = EulerDiscreteScheduler(**_BETAS, prediction_type=prediction_type, timestep_spacing="trailing")
    pipeline = StableDiffusionPipeline(
        vae=small_vae(),
        text_encoder=CLIPTextModel(_text_config(act="gelu")),
        tokenizer=bytes_tokenizer(),
        unet=UNet2DConditionModel(**small_unet()),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, **save)
    return folder


def write_sdxl(folder: Path) -> Path:
    """SDXL-Turbo: two text encoders, and sizes beside the timestep."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **small_unet()
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (32, 64),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "cross_attention_dim": 64,
        }
    )
    pipeline = StableDiffusionXLPipeline(
        vae=small_vae(),
        text_encoder=CLIPTextModel(_text_config(act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(act="gelu")),
        tokenizer=bytes_tokenizer(),
        tokenizer_2=bytes_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="trailing"),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_lcm(folder: Path) -> Path:
    """A latent consistency model: it is told the guidance that it was distilled with."""
    write_sd(folder)
    torch.manual_seed(0)
    UNet2DConditionModel(**small_unet(), time_cond_proj_dim=16).save_pretrained(folder / "unet")
    LCMScheduler(**_BETAS).save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "LCMScheduler"))
    return folder


def small_unet() -> dict[str, Any]:
    """The configuration of a UNet in SD's format."""
    return {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "norm_num_groups": 8,
    }


def small_vae() -> AutoencoderKL:
    """An autoencoder of 16x16 pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )


def _text_config(act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=32,
        max_position_embeddings=_LENGTH,
        hidden_act=act,
        bos_token_id=len(_vocabulary()) - 2,
        eos_token_id=len(_vocabulary()) - 1,
    )


def _vocabulary() -> dict[str, int]:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def bytes_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without any merges: a token for each letter."""
    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=_LENGTH)
