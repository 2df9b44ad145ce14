"""Prompts to what a UNet is conditioned on, the way the pipelines of SD 1/2, SDXL and their distilled forms do it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LCM_GUIDANCE = 8.5
"""LatentConsistencyModelPipeline's own."""


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


class TextConditioner:
    """One text encoder with its tokenizer, or two of each (SDXL)."""

    def __init__(self, tokenizers: Sequence[PreTrainedTokenizerBase], encoders: Sequence[PreTrainedModel]) -> None:
        self._towers = list(zip(tokenizers, encoders, strict=True))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], device: torch.device | None = None) -> Condition:
        """Return the features of `prompts`; what exceeds the tokenizer's length is cut off.

        Args:
            prompts: any number of them.
            device: what computes, where weights are offloaded to another one.
        """
        outputs = [self._run(*tower, prompts, device) for tower in self._towers]
        if len(outputs) == 1:
            embeds = outputs[0].last_hidden_state
            return Condition(embeds, pooled=None, sentences=self.sentences(prompts, embeds))
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Condition(embeds=embeds, pooled=outputs[-1].text_embeds)

    @property
    def makes_sentences(self) -> bool:
        """Whether it makes `Condition.sentences`."""
        (_, encoder), *others = self._towers
        return not others and encoder.config.model_type == "bert" and _uses_mask(encoder)

    def sentences(self, prompts: Sequence[str], embeds: torch.Tensor) -> torch.Tensor | None:
        """Return `Condition.sentences` of prompts whose `embeds` (B, L, D) are known, if the encoder makes some."""
        if not self.makes_sentences:
            return None
        weights = _tokens(self._towers[0][0], prompts).attention_mask.to(embeds).unsqueeze(-1)
        mean = (embeds * weights).sum(1) / weights.sum(1).clamp(min=1)  # as sentence-transformers pool
        return torch.nn.functional.normalize(mean, dim=-1)

    def _run(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PreTrainedModel,
        prompts: Sequence[str],
        device: torch.device | None,
    ) -> Any:
        tokens = _tokens(tokenizer, prompts).to(device or encoder.device)
        mask = tokens.attention_mask if _uses_mask(encoder) else None
        return encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=len(self._towers) > 1)


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Any:
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def _uses_mask(encoder: PreTrainedModel) -> bool:
    return bool(getattr(encoder.config, "use_attention_mask", False))


def is_text_tower(encoder: PreTrainedModel, weights: Path) -> bool:
    """Whether a text encoder's weights are all in this file of safetensors, whatever else is."""
    own = encoder.state_dict()
    with safe_open(weights, "pt") as file:
        if not own.keys() <= set(file.keys()) or any(each.is_meta for each in own.values()):
            return False  # what is offloaded can't be compared
        return all(torch.equal(file.get_tensor(name).to(each.device, each.dtype), each) for name, each in own.items())


def unet_arguments(unet: UNet2DConditionModel, condition: Condition, *, side: int) -> dict[str, Any]:
    """Return what a UNet is called with beside the sample and the timestep.

    Args:
        unet: which asks for them. One that was distilled with guidance (LCM, arXiv 2310.04378) is told of none.
        condition: of the prompts.
        side: of the picture, in pixels, which SDXL is told.
    """
    arguments: dict[str, Any] = {"encoder_hidden_states": condition.embeds}
    if condition.pooled is not None:
        arguments["added_cond_kwargs"] = added_conditions(condition.pooled, side)
    if (guidance := embed_guidance(unet, 0.0)) is not None:
        arguments["timestep_cond"] = guidance.to(condition.embeds)
    return arguments


def added_conditions(pooled: torch.Tensor, side: int) -> dict[str, torch.Tensor]:
    """Return what SDXL is told beside the text: a feature of each prompt (B, D), and that the picture is a square."""
    sizes = torch.tensor([side, side, 0, 0, side, side]).to(pooled)
    return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}


def embed_guidance(unet: UNet2DConditionModel, guidance_scale: float) -> torch.Tensor | None:
    """Return the `timestep_cond` (1, D) of a UNet that was distilled with guidance, and None for any other."""
    from diffusers.models.embeddings import get_timestep_embedding

    dim = unet.config.time_cond_proj_dim
    if dim is None:
        return None
    scaled = torch.tensor([1000.0 * (guidance_scale - 1)])
    embedded: torch.Tensor = get_timestep_embedding(scaled, dim, flip_sin_to_cos=False, downscale_freq_shift=1)
    return embedded
