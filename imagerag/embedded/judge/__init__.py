"""Image features of the second judge: a small residual network trained contrastively on drawings only.

It was trained to match drawings of one concept across styles, without held-out concepts. It shares no weights and no
training data with the first judge's network (`imagerag.evaluation.efficientnet`), and no weights with the models that
generate and retrieve pictures. `imagerag.recipes.judge` trains it.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

FOLDER = Path(__file__).parent
WEIGHTS_NAME, MANIFEST_NAME = "network.safetensors", "manifest.json"
SIDE = 64
DIM = 160
_WIDTHS = (24, 48, 96, DIM)
_BLOCKS = (1, 2, 2, 1)
_BATCH_SIZE = 64


class ResidualBlock(nn.Module):
    """Two convolutions with a residual connection (arXiv 1512.03385)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Identity() if (channels, stride) == (width, 1) else nn.Conv2d(channels, width, 1, stride)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return features (B, `width`, H / `stride`, W / `stride`) of `hidden_states` (B, C, H, W)."""
        return F.relu(self.shortcut(hidden_states) + self.convolutions(hidden_states))


class ContrastiveNetwork(nn.Module):
    """Residual network from pictures (B, 3, 64, 64), -1 to 1, to features (B, 160)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, _WIDTHS[0], 3, 2, 1, bias=False), nn.BatchNorm2d(_WIDTHS[0]), nn.ReLU()]
        channels = _WIDTHS[0]
        for stage, (width, blocks) in enumerate(zip(_WIDTHS, _BLOCKS, strict=True)):
            for block in range(blocks):
                layers.append(ResidualBlock(channels, width, 2 if stage and not block else 1))
                channels = width
        self.layers = nn.Sequential(*layers)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return features (B, 160), averaged over positions."""
        features: torch.Tensor = self.layers(pictures).mean((2, 3))
        return features


@cache
def load_contrastive_network(folder: Path = FOLDER, device: str = "cpu") -> ContrastiveNetwork:
    """Load the network with the weights in `folder`, the shipped ones by default."""
    from safetensors.torch import load_file

    network = ContrastiveNetwork()
    network.load_state_dict(load_file(folder / WEIGHTS_NAME))
    network.eval().requires_grad_(False).to(device)
    return network


@torch.inference_mode()
def contrastive_features(
    batches: Iterable[torch.Tensor], network: ContrastiveNetwork | None = None
) -> npt.NDArray[np.float32]:
    """Return the features (N, 160) of batches of pictures (B, 3, H, W), -1 to 1."""
    network = network or load_contrastive_network()
    device = next(network.parameters()).device
    features = [np.empty((0, DIM), np.float32)]
    for pictures in batches:
        for part in pictures.float().to(device).clamp(-1, 1).split(_BATCH_SIZE):
            fitted = F.interpolate(part, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
            features.append(network(fitted.contiguous(memory_format=torch.channels_last)).cpu().numpy())
    return np.concatenate(features)
