"""Prompts to what a UNet is conditioned on, the way the pipelines of SD 1/2, SDXL and their distilled forms do it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Condition:
    """Text features of a batch of prompts."""

    embeds: torch.Tensor
    """A feature for each token (B, L, D): the UNet's `encoder_hidden_states`."""
    pooled: torch.Tensor | None
    """A feature for each prompt (B, D), where there are two text encoders (SDXL): the UNet's `text_embeds`."""


class TextConditioner:
    """One text encoder with its tokenizer, or two of each (SDXL)."""

    def __init__(self, tokenizers: Sequence[PreTrainedTokenizerBase], encoders: Sequence[PreTrainedModel]) -> None:
        if len(tokenizers) != len(encoders) or not encoders:
            raise ValueError(f"{len(encoders)} text encoders need as many tokenizers; got {len(tokenizers)}")
        self._towers = list(zip(tokenizers, encoders, strict=True))

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return the features of `prompts`; what exceeds the tokenizer's length is cut off."""
        outputs = [self._run(tokenizer, encoder, prompts) for tokenizer, encoder in self._towers]
        if len(outputs) == 1:
            return Condition(embeds=outputs[0].last_hidden_state.clone(), pooled=None)
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Condition(embeds=embeds, pooled=outputs[-1].text_embeds)

    def _run(self, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, prompts: Sequence[str]):  # type: ignore[no-untyped-def]
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        return encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=len(self._towers) > 1)
