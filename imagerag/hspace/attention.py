"""The adapter's attention as diffusers knows attention, so that its backends and anyone's processors work with it."""

from collections.abc import Callable

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


class HSpaceAttnProcessor:
    """`softmax(Q K^T / sqrt(d)) V` by the backend that `set_attention_backend` chose; by default torch's own."""

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
        """Return what each target position gathers (B, L, D)."""
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
    """Holds the processor. Projections, and so all weights, are the adapter's own."""

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
        """Return what each target position gathers (B, L, D).

        Args:
            query: of the target's positions (B, L, D).
            key: of all references' positions (B, K * L, D).
            value: likewise, weighted by lambda.
            attention_mask: True where a position is there, broadcast to (B, heads, L, K * L).
        """
        attended: torch.Tensor = self.processor(self, query, key, value, attention_mask)
        return attended
