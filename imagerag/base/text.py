"""Text conditioning of UNets, as in diffusers' pipelines of SD 1/2, SDXL and models distilled from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imagerag.errors import UserError

LCM_GUIDANCE = 8.5
"""Default guidance scale of diffusers' LatentConsistencyModelPipeline."""


@dataclass(frozen=True)
class Condition:
    """Text features of a batch of prompts."""

    embeds: torch.Tensor
    """Token features (B, L, D): the UNet's `encoder_hidden_states`."""
    pooled: torch.Tensor | None
    """Prompt features (B, D) of models with two text encoders (SDXL): the UNet's `text_embeds`."""
    sentences: torch.Tensor | None = None
    """Sentence features (B, D) for retrieval, L2-normalised, if the text encoder is a sentence-transformer. The UNet
    does not use them."""


class TextConditioner:
    """A text encoder with its tokenizer, or two of each (SDXL)."""

    def __init__(
        self, tokenizers: Sequence[PreTrainedTokenizerBase], encoders: Sequence[PreTrainedModel | None]
    ) -> None:
        """Create a conditioner; `encode` needs all encoders, and pipelines may have been made without."""
        self._towers = list(zip(tokenizers, encoders, strict=True))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], device: torch.device | None = None) -> Condition:
        """Return the text features of prompts, truncated to the tokenizer's maximum length.

        Args:
            prompts: any number of prompts.
            device: device to compute on, if the weights are offloaded to another one.

        Raises:
            UserError: if a text encoder is missing.
        """
        outputs = [self._run(*tower, prompts, device) for tower in self._towers]
        if len(outputs) == 1:
            embeds = outputs[0].last_hidden_state
            return Condition(embeds, pooled=None, sentences=self.sentences(prompts, embeds))
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Condition(embeds=embeds, pooled=outputs[-1].text_embeds)

    @property
    def makes_sentences(self) -> bool:
        """Whether the encoder provides `Condition.sentences`."""
        (_, encoder), *others = self._towers
        return not others and encoder is not None and encoder.config.model_type == "bert" and _uses_mask(encoder)

    def sentences(self, prompts: Sequence[str], embeds: torch.Tensor) -> torch.Tensor | None:
        """Return `Condition.sentences` of prompts from their `embeds` (B, L, D), or None if the encoder has none."""
        if not self.makes_sentences:
            return None
        weights = _tokens(self._towers[0][0], prompts).attention_mask.to(embeds).unsqueeze(-1)
        mean = (embeds * weights).sum(1) / weights.sum(1).clamp(min=1)  # mean pooling, as in sentence-transformers
        return torch.nn.functional.normalize(mean, dim=-1)

    def _run(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PreTrainedModel | None,
        prompts: Sequence[str],
        device: torch.device | None,
    ) -> Any:
        if encoder is None:
            raise UserError(
                "captions of reference pictures are encoded by the base model's text encoders, which this pipeline "
                "does not have: add them, or use an index, whose features are cached"
            )
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


def is_text_tower(encoder: PreTrainedModel | None, weights: Path) -> bool:
    """Return whether a safetensors file contains all of a text encoder's weights; if there is no encoder, False."""
    if encoder is None:
        return False
    own = encoder.state_dict()
    with safe_open(weights, "pt") as file:
        if not own.keys() <= set(file.keys()) or any(each.is_meta for each in own.values()):
            return False  # offloaded weights can't be compared
        return all(torch.equal(file.get_tensor(name).to(each.device, each.dtype), each) for name, each in own.items())


def unet_arguments(unet: UNet2DConditionModel, condition: Condition, *, side: int) -> dict[str, Any]:
    """Return the arguments of a UNet's call other than the sample and the timestep.

    Args:
        unet: UNet to call. If it has guidance as an input (LCM, arXiv 2310.04378), the guidance scale is 0.
        condition: text features of the prompts.
        side: side of the square picture in pixels, an input of SDXL.
    """
    arguments: dict[str, Any] = {"encoder_hidden_states": condition.embeds}
    if condition.pooled is not None:
        arguments["added_cond_kwargs"] = added_conditions(condition.pooled, side)
    if (guidance := embed_guidance(unet, 0.0)) is not None:
        arguments["timestep_cond"] = guidance.to(condition.embeds)
    return arguments


def added_conditions(pooled: torch.Tensor, side: int) -> dict[str, torch.Tensor]:
    """Return SDXL's additional inputs: the prompt features (B, D), and the size of a square picture."""
    sizes = torch.tensor([side, side, 0, 0, side, side]).to(pooled)
    return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}


def embed_guidance(unet: UNet2DConditionModel, guidance_scale: float) -> torch.Tensor | None:
    """Return `timestep_cond` (1, D) for a UNet with guidance as an input (LCM), and None for others."""
    from diffusers.models.embeddings import get_timestep_embedding

    dim = unet.config.time_cond_proj_dim
    if dim is None:
        return None
    scaled = torch.tensor([1000.0 * (guidance_scale - 1)])
    embedded: torch.Tensor = get_timestep_embedding(scaled, dim, flip_sin_to_cos=False, downscale_freq_shift=1)
    return embedded
