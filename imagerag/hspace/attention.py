"""The adapter's attention as a diffusers attention module, which supports attention backends and custom processors."""

from collections.abc import Callable

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


class HSpaceAttnProcessor:
    """Computes `softmax(Q K^T / sqrt(d)) V` with the backend of `set_attention_backend`, torch's SDPA by default."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "HSpaceAttention",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention output (B, L, D).

        Args:
            attn: the attention module.
            query: queries of the target's positions (B, L, D).
            key: keys of all references' positions (B, K * L, D).
            value: values of all references' positions, weighted by lambda (B, K * L, D).
            attention_mask: True for valid positions, broadcastable to (B, heads, L, K * L).
        """
        query, key, value = (tokens.unflatten(2, (attn.heads, -1)) for tokens in (query, key, value))
        attended: torch.Tensor = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attended.flatten(2)


class HSpaceAttention(nn.Module, AttentionModuleMixin):  # type: ignore[misc]
    """Holds the attention processor. It has no weights: the adapter owns the projections."""

    _default_processor_cls = HSpaceAttnProcessor
    _available_processors = [HSpaceAttnProcessor]  # noqa: RUF012 - as in diffusers
    _supports_qkv_fusion = False
    processor: Callable[..., torch.Tensor]
    set_processor: Callable[..., None]

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.set_processor(HSpaceAttnProcessor())

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention output (B, L, D).

        Args:
            query: queries of the target's positions (B, L, D).
            key: keys of all references' positions (B, K * L, D).
            value: values of all references' positions, weighted by lambda (B, K * L, D).
            attention_mask: True for valid positions, broadcastable to (B, heads, L, K * L).
        """
        attended: torch.Tensor = self.processor(self, query, key, value, attention_mask)
        return attended
