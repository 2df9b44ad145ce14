"""Fusion of references into the target's H-space features: by the adapter or by slerp."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.hspace.slerp import slerp

FusionName = Literal["adapter", "slerp", "none"]


class Fusion(Protocol):
    """Fuses references into `h_target`, once per denoising step."""

    @property
    def shares(self) -> torch.Tensor:
        """The weight of each reference (B, K)."""
        ...

    def __call__(self, h_target: torch.Tensor) -> torch.Tensor:
        """Return the fused features `h` for `h_target` (B, C, H, W)."""
        ...


@dataclass(frozen=True)
class AdapterFusion:
    """`h = h_target + scale * dh`, with `dh` by cross-attention to all references (paper, Sec. 3.3)."""

    adapter: HSpaceAdapter
    h_references: torch.Tensor
    """Features of the references (B, K, C, H, W)."""
    weights: torch.Tensor
    """Lambda of each reference (B, K)."""
    scale: float

    @property
    def shares(self) -> torch.Tensor:
        """The weight of each reference (B, K): lambda, or 0 if the scale is 0."""
        return self.weights if self.scale else torch.zeros_like(self.weights)

    def __call__(self, h_target: torch.Tensor) -> torch.Tensor:
        """Return the fused features `h` for `h_target` (B, C, H, W)."""
        references = _fitted(self.h_references, h_target)
        fused: torch.Tensor = self.adapter(h_target, references, self.weights, self.scale).sample
        return fused


@dataclass(frozen=True)
class SlerpFusion:
    """`h = slerp(h_target, h_reference; w)` (paper, Sec. 3.2).

    Beyond the paper: with several references, `h_reference` is their mean, weighted by lambda. Targets without a
    reference are returned unchanged, bit for bit.
    """

    h_references: torch.Tensor
    weights: torch.Tensor
    w: float

    @property
    def shares(self) -> torch.Tensor:
        """The weight of each reference (B, K); they sum to `1 - w`."""
        return (1 - self.w) * self._parts

    def __call__(self, h_target: torch.Tensor) -> torch.Tensor:
        """Return the fused features `h` for `h_target` (B, C, H, W)."""
        parts = self._parts[:, :, None, None, None].to(h_target.dtype)
        fused = slerp(h_target, (parts * _fitted(self.h_references, h_target)).sum(1), self.w)
        return torch.where((self.weights > 0).any(1).view(-1, 1, 1, 1), fused, h_target)

    @property
    def _parts(self) -> torch.Tensor:
        smallest = torch.finfo(self.weights.dtype).tiny
        return self.weights / self.weights.sum(1, keepdim=True).clamp(min=smallest)


@dataclass(frozen=True)
class MaskedFusion:
    """`h = h_target + sum_k M_k (F_k(h_target) - h_target)`: each reference in its own region of the picture.

    Beyond the paper, like IP-Adapter's masks. F_k is the fusion of reference k alone; overlapping masks are normalised
    to a sum of 1.
    """

    parts: tuple[Fusion, ...]
    """The fusions F_k of single references (K)."""
    masks: torch.Tensor
    """Masks (B, K, H, W), 0 to 1, of any height and width."""

    @property
    def shares(self) -> torch.Tensor:
        """The weight of each reference (B, K) where its mask is 1."""
        return torch.cat([part.shares for part in self.parts], dim=1)

    def __call__(self, h_target: torch.Tensor) -> torch.Tensor:
        """Return the fused features `h` for `h_target` (B, C, H, W)."""
        masks = torch.nn.functional.interpolate(self.masks, h_target.shape[-2:], mode="area")
        masks = (masks / masks.sum(1, keepdim=True).clamp(min=1)).to(h_target.dtype)
        fused = h_target
        for k, part in enumerate(self.parts):
            fused = fused + masks[:, k : k + 1] * (part(h_target) - h_target)
        return fused


def _fitted(h_references: torch.Tensor, h_target: torch.Tensor) -> torch.Tensor:
    """Move references (B, K, C, H, W) to the target's device and dtype, and resample them to its height and width."""
    references = h_references.to(h_target)
    if references.shape[-2:] == h_target.shape[-2:]:
        return references
    size = h_target.shape[-2:]
    resampled: torch.Tensor = torch.nn.functional.interpolate(references.flatten(0, 1), size, mode="bilinear")
    return resampled.view(*references.shape[:3], *size)
