"""Image grids for the training log."""

import torch
from PIL import Image

_GAP = 2


def grid(pixels: torch.Tensor, columns: int) -> Image.Image:
    """Return a grid of pictures (N, 3, H, W), -1 to 1, with the given number of columns."""
    from torchvision.utils import make_grid

    sheet = make_grid(pixels.float().cpu().clamp(-1, 1) / 2 + 0.5, nrow=columns, padding=_GAP, pad_value=0.8)
    return Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy())
