"""How references are fused into the target's H-space: two ways, and none."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.hspace.slerp import slerp

FusionName = Literal["adapter", "slerp", "none"]


class Fusion(Protocol):
    """What a step does with `h_target` (B, C, H, W)."""

    @property
    def shares(self) -> torch.Tensor:
        """How much of each reference is used (B, K)."""
        ...

    def __call__(self, h_target: torch.Tensor) -> torch.Tensor:
        """Return `h`, of the same shape."""
        ...


@dataclass(frozen=True)
class AdapterFusion:
    """`h = h_target + scale * dh`, with `dh` by cross-attention to all references (paper, Sec. 3.3)."""

    adapter: HSpaceAdapter
    h_references: torch.Tensor
    """(B, K, C, H, W)."""
    weights: torch.Tensor
    """Lambda (B, K)."""
    scale: float

    @property
    def shares(self) -> torch.Tensor:
        """Lambda, and 0 where nothing is added."""
        return self.weights if self.scale else torch.zeros_like(self.weights)

    def __call__(self, h_target: torch.Tensor) -> torch.Tensor:
        """Return the fused features."""
        references = _fitted(self.h_references, h_target)
        fused: torch.Tensor = self.adapter(h_target, references, self.weights, self.scale).sample
        return fused


@dataclass(frozen=True)
class SlerpFusion:
    """`h = slerp(h_target, h_reference; w)` (paper, Sec. 3.2).

    Beyond the paper: of several references, `h_reference` is the mean, weighted by lambda. A target without any stays
    as it is, bit for bit.
    """

    h_references: torch.Tensor
    weights: torch.Tensor
    w: float

    @property
    def shares(self) -> torch.Tensor:
        """The part of `1 - w` that is each reference's."""
        return (1 - self.w) * self._parts

    def __call__(self, h_target: torch.Tensor) -> torch.Tensor:
        """Return the fused features."""
        parts = self._parts[:, :, None, None, None].to(h_target.dtype)
        fused = slerp(h_target, (parts * _fitted(self.h_references, h_target)).sum(1), self.w)
        return torch.where((self.weights > 0).any(1).view(-1, 1, 1, 1), fused, h_target)

    @property
    def _parts(self) -> torch.Tensor:
        smallest = torch.finfo(self.weights.dtype).tiny
        return self.weights / self.weights.sum(1, keepdim=True).clamp(min=smallest)


@dataclass(frozen=True)
class MaskedFusion:
    """`h = h_target + sum_k M_k (F_k(h_target) - h_target)`: each reference in its own place of the picture.

    Beyond the paper, as IP-Adapter's masks are. F_k is the fusion of reference k alone; where masks overlap, they share
    the place.
    """

    parts: tuple[Fusion, ...]
    """F_k, K of them."""
    masks: torch.Tensor
    """(B, K, H, W), 0 to 1, of any height and width."""

    @property
    def shares(self) -> torch.Tensor:
        """How much of each reference is used where its mask is 1."""
        return torch.cat([part.shares for part in self.parts], dim=1)

    def __call__(self, h_target: torch.Tensor) -> torch.Tensor:
        """Return the fused features."""
        masks = torch.nn.functional.interpolate(self.masks, h_target.shape[-2:], mode="area")
        masks = (masks / masks.sum(1, keepdim=True).clamp(min=1)).to(h_target.dtype)
        fused = h_target
        for k, part in enumerate(self.parts):
            fused = fused + masks[:, k : k + 1] * (part(h_target) - h_target)
        return fused


def _fitted(h_references: torch.Tensor, h_target: torch.Tensor) -> torch.Tensor:
    """Return references (B, K, C, H, W) with the device, dtype and, resampled, the height and width of the target."""
    references = h_references.to(h_target)
    if references.shape[-2:] == h_target.shape[-2:]:
        return references
    size = h_target.shape[-2:]
    resampled: torch.Tensor = torch.nn.functional.interpolate(references.flatten(0, 1), size, mode="bilinear")
    return resampled.view(*references.shape[:3], *size)
