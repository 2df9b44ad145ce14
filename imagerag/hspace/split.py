"""A diffusers UNet split into encoder and decoder after the mid block, whose output is the H-space (paper, Sec. 3.1).

Used by training, which runs the encoder without gradients. Inference and cached features use the UNet's own forward
(`midblock`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel


@dataclass(frozen=True)
class EncoderOutput:
    """Output of the encoder and input of the decoder."""

    h: torch.Tensor
    """Output of the mid block (B, C, H, W)."""
    skips: tuple[torch.Tensor, ...]
    """Skip connections, outermost first."""
    temb: torch.Tensor
    """Embedding (B, D) of the timestep and of all conditions except the text."""
    text: torch.Tensor
    """Text features (B, L, D) for cross-attention."""
    pass_sizes: bool
    """Whether the decoder needs explicit upsampling sizes: the sample's sides are not multiples of the downscaling."""


def encode(
    unet: UNet2DConditionModel,
    sample: torch.Tensor,
    timestep: torch.Tensor | int,
    encoder_hidden_states: torch.Tensor,
    *,
    timestep_cond: torch.Tensor | None = None,
    added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
) -> EncoderOutput:
    """Run `conv_in`, the embeddings, `down_blocks` and `mid_block`.

    Args:
        unet: the UNet.
        sample: latents (B, C, H, W).
        timestep: one timestep for all latents, or one each (B,).
        encoder_hidden_states: text features (B, L, D).
        timestep_cond: as for the UNet's forward.
        added_cond_kwargs: as for the UNet's forward.
    """
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    temb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
    added = unet.get_aug_embed(
        emb=temb, encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
    )
    temb = temb if added is None else temb + added
    if unet.time_embed_act is not None:
        temb = unet.time_embed_act(temb)
    text = unet.process_encoder_hidden_states(
        encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
    )
    pass_sizes = any(side % 2**unet.num_upsamplers for side in sample.shape[-2:])

    h = unet.conv_in(sample)
    skips = (h,)
    for block in unet.down_blocks:
        h, outputs = block(hidden_states=h, temb=temb, **_text_of(block, text))
        skips += outputs
    h = unet.mid_block(h, temb, **_text_of(unet.mid_block, text))
    return EncoderOutput(h=h, skips=skips, temb=temb, text=text, pass_sizes=pass_sizes)


def decode(unet: UNet2DConditionModel, encoded: EncoderOutput) -> torch.Tensor:
    """Run `up_blocks` and the output layers, and return the UNet's prediction (B, C, H, W)."""
    h, skips = encoded.h, encoded.skips
    for index, block in enumerate(unet.up_blocks):
        num_skips = len(block.resnets)
        skips, own = skips[:-num_skips], skips[-num_skips:]
        last = index == len(unet.up_blocks) - 1
        h = block(
            hidden_states=h,
            temb=encoded.temb,
            res_hidden_states_tuple=own,
            upsample_size=skips[-1].shape[2:] if encoded.pass_sizes and not last else None,
            **_text_of(block, encoded.text),
        )
    if unet.conv_norm_out is not None:
        h = unet.conv_act(unet.conv_norm_out(h))
    prediction: torch.Tensor = unet.conv_out(h)
    return prediction


def _text_of(block: torch.nn.Module, text: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
