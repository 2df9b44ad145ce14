"""Training-free fusion: spherical interpolation in the H-space (paper, Sec. 3.2)."""

import torch

_PARALLEL = 1e-4
"""Minimum sine of the angle; below it, the quotients of sines are numerically unstable."""


def slerp(h_target: torch.Tensor, h_reference: torch.Tensor, w: float) -> torch.Tensor:
    """Return `sin((1-w) omega)/sin(omega) h_reference + sin(w omega)/sin(omega) h_target`, omega the angle of both.

    If the angle is close to 0 or pi, interpolate linearly. A weight below 0 continues beyond the reference, away
    from the target.

    Args:
        h_target: features of the target (B, C, H, W).
        h_reference: features of the reference (B, C, H, W).
        w: weight of the target, -1 to 1: 1 returns the target, bit for bit, and 0 the reference.

    Raises:
        ValueError: if `w` is not between -1 and 1, or the shapes differ.
    """
    if not -1 <= w <= 1:
        raise ValueError(f"the weight of the target in slerp must be between -1 and 1; got {w}")
    if h_target.shape != h_reference.shape:
        raise ValueError(f"slerp needs equal shapes; got {tuple(h_target.shape)} and {tuple(h_reference.shape)}")
    if w == 1:
        return h_target
    target, reference = h_target.float().flatten(1), h_reference.float().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(target, reference, dim=1).clamp(-1, 1)
    omega = torch.arccos(cosine).unsqueeze(1)
    sine = torch.sin(omega)
    parallel = sine < _PARALLEL
    sine = torch.where(parallel, 1.0, sine)
    of_reference = torch.where(parallel, 1 - w, torch.sin((1 - w) * omega) / sine)
    of_target = torch.where(parallel, w, torch.sin(w * omega) / sine)
    fused = of_reference * reference + of_target * target
    return fused.to(h_target.dtype).view_as(h_target)
