"""The adapter: what references add to the target's H-space by cross-attention (paper, Sec. 3.3)."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.errors import UserError
from imagerag.hspace.attention import HSpaceAttention

_SHARPNESS = 50.0
"""Of the choice among references; a difference in nearness of 0.1 is one of shares by a factor of 150."""
_TEXT = 4.0
"""How much nearness by text counts beside that in the H-space. With as much, a new reference of just what was asked for
lost against one that is more like the picture without references, in 5 of 21 cases."""


def gate(similarities: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return lambda of each reference: its similarity, cut to 0 to 1, and 0 where it is under the threshold.

    Args:
        similarities: cosines (B, K) of the prompt's and the references' text features.
        threshold: references less similar than this have no effect at all.
    """
    return torch.where(similarities >= threshold, similarities.clamp(0, 1), 0.0)


def load_adapter(folder: Path, unet: UNet2DConditionModel) -> "HSpaceAdapter":
    """Load an adapter for a base model's UNet, in its dtype and on its device.

    Raises:
        UserError: if the folder holds no adapter, or one for another H-space.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"an adapter's folder has config.json, as save_pretrained writes it; {folder} has none")
    adapter: HSpaceAdapter = HSpaceAdapter.from_pretrained(
        folder, torch_dtype=unet.dtype, use_safetensors=True, local_files_only=True
    )
    channels = unet.config.block_out_channels[-1]
    if adapter.config.channels != channels:
        raise UserError(
            f"the adapter in {folder} is for an H-space of {adapter.config.channels} channels; the base model's has "
            f"{channels}"
        )
    adapter.eval().requires_grad_(False).to(unet.device)
    return adapter


@dataclass
class HSpaceAdapterOutput(BaseOutput):  # type: ignore[misc]
    """What an adapter returns."""

    sample: torch.Tensor
    """The fused features (B, C, H, W)."""


class HSpaceAdapter(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """`h = h_target + dh`, `dh = W_O softmax(Q K^T / sqrt(d)) (lambda V)`; Q is the target's, K and V the references'.

    Beyond the paper, first: the keys and values of all references are in one attention, each value weighted by its
    reference's own lambda, which for one reference is the paper's formula. Second: to what attention gathers, dh adds
    `g * sum_k a_k lambda_k (h_k - h_target)`, position by position, with a gate g of the target in -1 to 1 for each
    channel, and with shares a_k that favour the reference that is nearest by text, and of those in the H-space, since
    a mean of pictures is no picture. Attention alone can only add to the target; this can also put a reference in its
    place, as slerp does (paper, Sec. 3.2), and training finds that at once. Third: output projection and gate start at
    zero, so that training starts at the base model. 36M parameters for SD 2.1.

    LoRA's target modules are `to_q.0`, `to_q.2`, `to_k`, `to_v` and `to_out`.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, channels: int = 1280, inner_dim: int | None = None, num_heads: int = 8, default_scale: float = 1.0
    ) -> None:
        """Make an adapter that changes nothing.

        Args:
            channels: of the H-space.
            inner_dim: of queries, keys and values; by default twice the channels.
            num_heads: of the attention.
            default_scale: what a pipeline takes as `scale` unless it is told another.

        Raises:
            ValueError: if the dimensions can't be divided.
        """
        super().__init__()
        inner_dim = inner_dim or 2 * channels
        if inner_dim % num_heads or channels % 4:
            raise ValueError(
                f"inner_dim must be divisible by num_heads and channels by 4; got {inner_dim}, {num_heads}, {channels}"
            )
        self.norm_target = nn.LayerNorm(channels)
        self.norm_reference = nn.LayerNorm(channels)
        # Most of the parameters are here, where positions are the fewest: as many in `to_v` learnt the same, and cost
        # twice the time with four references.
        self.to_q = nn.Sequential(
            nn.Linear(channels, 5 * channels), nn.GELU(), nn.Linear(5 * channels, inner_dim, bias=False)
        )
        self.to_k = nn.Linear(channels, inner_dim, bias=False)
        self.to_v = nn.Linear(channels, inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, channels, bias=False)
        self.to_gate = nn.Linear(channels, channels)
        self.attn = HSpaceAttention(num_heads)
        self.gradient_checkpointing = False
        for zero in (self.to_out.weight, self.to_gate.weight, self.to_gate.bias):
            nn.init.zeros_(zero)

    def start_gate(self, gate: float) -> None:
        """Have each position and channel start with the same gate, 0 to less than 1: the share of references in `h`.

        With 0 an adapter starts as the base model. With more it starts as an interpolation towards the references, as
        slerp is, and what is learnt is where that is too much or too little.
        """
        nn.init.zeros_(self.to_gate.weight)
        nn.init.constant_(self.to_gate.bias, math.atanh(gate))

    def forward(
        self,
        h_target: torch.Tensor,
        h_references: torch.Tensor,
        weights: torch.Tensor,
        scale: float = 1.0,
        return_dict: bool = True,
    ) -> HSpaceAdapterOutput | tuple[torch.Tensor]:
        """Return the fused features.

        Args:
            h_target: (B, C, H, W).
            h_references: (B, K, C, H, W).
            weights: lambda (B, K); what has 0 is as if it were not there. A row without any other is its target, bit
                for bit.
            scale: of what is added; 0 is the target, bit for bit.
            return_dict: whether to return them as `sample` of an output rather than in a tuple.
        """
        if scale == 0 or h_references.shape[1] == 0:
            fused = h_target
        elif torch.is_grad_enabled() and self.gradient_checkpointing:
            fused = self._gradient_checkpointing_func(self._fuse, h_target, h_references, weights, scale)
        else:
            fused = self._fuse(h_target, h_references, weights, scale)
        return HSpaceAdapterOutput(sample=fused) if return_dict else (fused,)

    def _fuse(
        self, h_target: torch.Tensor, h_references: torch.Tensor, weights: torch.Tensor, scale: float
    ) -> torch.Tensor:
        size, channels, height, width = h_target.shape
        positions = self._positions(height, width, h_target)
        target = self.norm_target(h_target.flatten(2).transpose(1, 2))
        references = self.norm_reference(h_references.flatten(3).transpose(2, 3))  # (B, K, H * W, C)
        query = self.to_q(target + positions)
        key = self.to_k(references + positions).flatten(1, 2)
        value = (self.to_v(references) * weights.to(references.dtype)[:, :, None, None]).flatten(1, 2)
        present = weights > 0
        # A row without references attends to everything, so that no softmax is over nothing; it is put right below.
        seen = torch.where(present.any(1, keepdim=True), present, True).repeat_interleave(height * width, dim=1)
        added = self.to_out(self.attn(query, key, value, seen[:, None, None, :]))
        gates = torch.tanh(self.to_gate(target))
        added = added + gates * self._difference(target, references, weights, h_target, h_references)
        fused = h_target + scale * added.transpose(1, 2).reshape(size, channels, height, width).to(h_target.dtype)
        return torch.where(present.any(1).view(-1, 1, 1, 1), fused, h_target)

    def _difference(
        self, target: torch.Tensor, references: torch.Tensor, weights: torch.Tensor, h: torch.Tensor, hs: torch.Tensor
    ) -> torch.Tensor:
        """Return how references `hs` differ from the target `h` (B, H * W, C), by their shares and lambda.

        `target` (B, H * W, C) and `references` (B, K, H * W, C) are the same, normalised.
        """
        near = F.cosine_similarity(target[:, None], references, dim=-1).mean(-1) + _TEXT * weights
        shares = torch.softmax((_SHARPNESS * near.float()).masked_fill(weights <= 0, -1e9), dim=1) * weights
        difference = torch.einsum("bk,bkchw->bchw", shares.to(h.dtype), hs.to(h.dtype) - h[:, None])
        return difference.flatten(2).transpose(1, 2)

    def _positions(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = get_2d_sincos_pos_embed(
            self.config.channels, (height, width), device=like.device, output_type="pt"
        )
        return embedding.to(like.dtype)
