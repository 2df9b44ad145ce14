"""Prompts to what a UNet is conditioned on, the way the pipelines of SD 1/2, SDXL and their distilled forms do it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Condition:
    """Text features of a batch of prompts."""

    embeds: torch.Tensor
    """A feature for each token (B, L, D): the UNet's `encoder_hidden_states`."""
    pooled: torch.Tensor | None
    """A feature for each prompt (B, D), where there are two text encoders (SDXL): the UNet's `text_embeds`."""
    sentences: torch.Tensor | None = None
    """A feature for each prompt (B, D) to compare it with others by cosine, of length one, where the text encoder was
    trained for that: sentence-transformers. A UNet doesn't see it, so what is made of a condition lacks it."""

    def repeat_interleave(self, times: int) -> "Condition":
        """Return each prompt's features `times` times, one after the other."""
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(times, dim=0)
        return Condition(self.embeds.repeat_interleave(times, dim=0), pooled)

    def followed_by(self, other: "Condition") -> "Condition":
        """Return both batches as one."""
        pooled = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return Condition(torch.cat([self.embeds, other.embeds]), pooled)


class TextConditioner:
    """One text encoder with its tokenizer, or two of each (SDXL)."""

    def __init__(self, tokenizers: Sequence[PreTrainedTokenizerBase], encoders: Sequence[PreTrainedModel]) -> None:
        self._towers = list(zip(tokenizers, encoders, strict=True))

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return the features of `prompts`; what exceeds the tokenizer's length is cut off."""
        outputs, masks = zip(*(self._run(*tower, prompts) for tower in self._towers), strict=True)
        if len(outputs) == 1:
            # An inference tensor can't take part in training, a clone can.
            embeds = outputs[0].last_hidden_state.clone()
            is_sentence_encoder = self._towers[0][1].config.model_type == "bert"
            sentences = _mean(embeds, masks[0]) if is_sentence_encoder and masks[0] is not None else None
            return Condition(embeds, pooled=None, sentences=sentences)
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Condition(embeds=embeds, pooled=outputs[-1].text_embeds)

    def encode_empty(self, size: int) -> Condition:
        """Return the condition of no text, for guidance: the empty prompt, or zeros for SDXL, as they were trained."""
        empty = self.encode([""]).repeat_interleave(size)
        if empty.pooled is None:
            return empty
        return Condition(torch.zeros_like(empty.embeds), torch.zeros_like(empty.pooled))

    def _run(
        self, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, prompts: Sequence[str]
    ) -> tuple[Any, torch.Tensor | None]:
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        return encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=len(self._towers) > 1), mask


def is_text_tower(encoder: PreTrainedModel, weights: Path) -> bool:
    """Whether a text encoder's weights are all in this file of safetensors, whatever else is."""
    own = encoder.state_dict()
    with safe_open(weights, "pt") as file:
        if not own.keys() <= set(file.keys()):
            return False
        return all(torch.equal(file.get_tensor(name).to(each.device, each.dtype), each) for name, each in own.items())


def _mean(embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean token (B, D) of each prompt, of length one, as sentence-transformers pool."""
    weights = mask.unsqueeze(-1).to(embeds.dtype)
    return torch.nn.functional.normalize((embeds * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


def unet_arguments(
    unet: UNet2DConditionModel, condition: Condition, *, side: int, guidance_scale: float = 0.0
) -> dict[str, Any]:
    """Return what a UNet is called with beside the sample and the timestep.

    Args:
        side: of the picture, in pixels, which SDXL is told.
        guidance_scale: is told to a UNet that was distilled with it (LCM, arXiv 2310.04378).
    """
    arguments: dict[str, Any] = {"encoder_hidden_states": condition.embeds}
    if condition.pooled is not None:
        sizes = torch.tensor([side, side, 0, 0, side, side], device=unet.device, dtype=unet.dtype)
        time_ids = sizes.expand(len(condition.embeds), -1)
        arguments["added_cond_kwargs"] = {"text_embeds": condition.pooled, "time_ids": time_ids}
    if (dim := unet.config.time_cond_proj_dim) is not None:
        arguments["timestep_cond"] = _embed_guidance(guidance_scale, dim).to(unet.device, unet.dtype)
    return arguments


def _embed_guidance(guidance_scale: float, dim: int) -> torch.Tensor:
    from diffusers.models.embeddings import get_timestep_embedding

    scaled = torch.tensor([1000.0 * (guidance_scale - 1)])
    embedded: torch.Tensor = get_timestep_embedding(scaled, dim, flip_sin_to_cos=False, downscale_freq_shift=1)
    return embedded
