"""The adapter: cross-attention of the target's H-space features to those of references (paper, Sec. 3.3)."""

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

from imagerag.errors import UserError
from imagerag.hspace.attention import HSpaceAttention


def gate(similarities: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return lambda (B, K) of references: similarities clamped to 0 to 1, and 0 below the threshold.

    Args:
        similarities: cosine similarities (B, K) of the prompts' and the references' text features.
        threshold: references less similar than this have no effect.
    """
    return torch.where(similarities >= threshold, similarities.clamp(0, 1), 0.0)


def load_adapter(folder: Path, unet: UNet2DConditionModel) -> "HSpaceAdapter":
    """Load an adapter for a base model's UNet, in the UNet's dtype and on its device.

    Raises:
        UserError: if the folder has no adapter, or one for an H-space with another number of channels.
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
    """Output of an adapter."""

    sample: torch.Tensor
    """Fused features (B, C, H, W)."""


class HSpaceAdapter(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """`h = h_target + dh`, `dh = W_O softmax(Q K^T / sqrt(d)) (lambda V)`, Q of the target, K and V of references.

    Differences from the paper:

    1. One attention has the keys and values of all references, and each value is weighted by its reference's own
       lambda. For a single reference, this is the paper's formula.
    2. `dh` has a second term, `g * lambda_n (h_n - h_target)`, computed at each position. The gate g, -1 to 1 per
       channel, is a function of the target. Reference n has the most similar text, and is the first of equals: a mean
       of pictures is not a picture. Attention alone can only add to the target; this term can also replace it by a
       reference, as slerp does (paper, Sec. 3.2), and training finds that immediately.
    3. Output projection and gate are initialised with zeros, so that training starts from the base model.

    The adapter has 36M parameters for SD 2.1. LoRA's target modules are `to_q.0`, `to_q.2`, `to_k`, `to_v` and
    `to_out`.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, channels: int = 1280, inner_dim: int | None = None, num_heads: int = 8, default_scale: float = 1.0
    ) -> None:
        """Create an adapter whose initial weights leave the target unchanged.

        Args:
            channels: number of H-space channels.
            inner_dim: dimension of queries, keys and values; by default twice the channels.
            num_heads: number of attention heads.
            default_scale: default `scale` in pipelines.

        Raises:
            ValueError: if `inner_dim` is not divisible by `num_heads`, or `channels` by 4.
        """
        super().__init__()
        inner_dim = inner_dim or 2 * channels
        if inner_dim % num_heads or channels % 4:
            raise ValueError(
                f"inner_dim must be divisible by num_heads and channels by 4; got {inner_dim}, {num_heads}, {channels}"
            )
        self.norm_target = nn.LayerNorm(channels)
        self.norm_reference = nn.LayerNorm(channels)
        # Most parameters are here, where there are the fewest positions: the same number in `to_v` learnt equally well,
        # but took twice the time with four references.
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
        """Initialise all gates to a constant from 0 to below 1: the share of references in `h`.

        With 0, training starts from the base model. With more, it starts from an interpolation towards the references,
        like slerp, and learns where to use more or less of them.
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
            h_target: features of the target (B, C, H, W).
            h_references: features of the references (B, K, C, H, W).
            weights: lambda (B, K); references with 0 are ignored. Rows with only zeros return the target, bit for bit.
            scale: factor of the addition `dh`; 0 returns the target, bit for bit.
            return_dict: whether to return an `HSpaceAdapterOutput` instead of a tuple.
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
        # Rows without references attend to all, because an empty softmax is NaN; the last line returns their target.
        seen = torch.where(present.any(1, keepdim=True), present, True).repeat_interleave(height * width, dim=1)
        added = self.to_out(self.attn(query, key, value, seen[:, None, None, :]))
        gates = torch.tanh(self.to_gate(target))
        added = added + gates * _difference(h_target, h_references, weights)
        fused = h_target + scale * added.transpose(1, 2).reshape(size, channels, height, width).to(h_target.dtype)
        return torch.where(present.any(1).view(-1, 1, 1, 1), fused, h_target)

    def _positions(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = get_2d_sincos_pos_embed(
            self.config.channels, (height, width), device=like.device, output_type="pt"
        )
        return embedding.to(like.dtype)


def _difference(h: torch.Tensor, hs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return lambda times the difference of the nearest of the references `hs` and the target `h` (B, H * W, C)."""
    weight, nearest = weights.max(1)  # the first of equals
    reference = hs[torch.arange(len(hs), device=hs.device), nearest].to(h.dtype)
    difference = weight.view(-1, 1, 1, 1).to(h.dtype) * (reference - h)
    return difference.flatten(2).transpose(1, 2)
