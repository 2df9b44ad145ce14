"""Augmented unlabelled pictures: drawings and clip art with random transforms, colours, textures and backgrounds.

The autoencoder and the reconstruction from the H-space need no captions. They must generalise beyond emoji, because
users' images include photographs.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses
from tqdm import tqdm

from imagerag.errors import UserError

_SIDE = 128
_KEPT_SIDE = 160
"""Side of clip art in memory, larger than `_SIDE` for augmentation by scaling."""
_NEAR_WHITE = 250
_MOST_ALIKE = 0.98
"""Clip art is skipped if this share of its opaque pixels, or more, has the same brightness."""
_WHITE_GROUND, _PLAIN_GROUND = 0.6, 0.2
"""Shares of white and single-colour backgrounds; the others are textures."""
_TEXTURED, _OVERLAID = 0.3, 0.15
"""Shares of pictures with a texture, and with another picture as an overlay."""


@dataclass(frozen=True)
class Cutouts:
    """Pictures with transparent backgrounds."""

    pixels: torch.Tensor
    """RGBA bytes (N, 4, H, W)."""
    digest: str
    """SHA-256 of the pixels."""

    @classmethod
    def of_drawings(cls, pixels: torch.Tensor) -> "Cutouts":
        """Return drawings on white, bytes (N, 3, H, W), with the surrounding white made transparent."""
        opaque = torch.stack([_opaque(picture) for picture in pixels])
        return cls._of(torch.cat([pixels, opaque[:, None]], dim=1))

    @classmethod
    def of_files(cls, folders: Sequence[Path]) -> "Cutouts":
        """Return all PNG files under `folders`, each fitted into a square.

        Raises:
            UserError: if there are none.
        """
        paths = sorted(path for folder in folders for path in folder.rglob("*.png"))
        squares = list(_squares(paths))
        if not squares:
            raise UserError(f"there are no PNG pictures under {', '.join(map(str, folders))}")
        return cls._of(torch.stack(squares))

    @classmethod
    def _of(cls, pixels: torch.Tensor) -> "Cutouts":
        return cls(pixels, hashlib.sha256(pixels.numpy().tobytes()).hexdigest())


def _opaque(picture: torch.Tensor) -> torch.Tensor:
    """Return the alpha channel, bytes (H, W), of a picture (3, H, W): 0 in white regions that touch the border."""
    regions, _ = ndimage.label((picture >= _NEAR_WHITE).all(0).numpy())
    border = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
    ground = np.isin(regions, border[border > 0])
    return torch.from_numpy(np.where(ground, 0, 255).astype(np.uint8))


def _squares(paths: Sequence[Path]) -> Iterator[torch.Tensor]:
    """Yield each file as RGBA bytes (4, H, W); skip blank ones."""
    for path in tqdm(paths, desc="reading", unit=" pictures", disable=None):
        try:
            with Image.open(path) as image:
                small = image.convert("RGBA")
        except Image.DecompressionBombError:
            continue
        small.thumbnail((_KEPT_SIDE, _KEPT_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
        square = Image.new("RGBA", (_KEPT_SIDE, _KEPT_SIDE))
        square.paste(small, ((_KEPT_SIDE - small.width) // 2, (_KEPT_SIDE - small.height) // 2))
        pixels = np.asarray(square).transpose(2, 0, 1)
        counts = np.bincount(pixels[:3].astype(np.uint16).sum(0)[pixels[3] > 127], minlength=1)
        if _MOST_ALIKE * counts.sum() > counts.max():
            yield torch.from_numpy(np.ascontiguousarray(pixels))


def vary(cutouts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return augmented pictures (B, 3, 128, 128), -1 to 1, of cutouts, RGBA bytes (B, 4, H, W)."""
    size = len(cutouts)
    opaque = cutouts[:, 3:].float() / 255
    colours = _recoloured(cutouts[:, :3].float() / 255, generator)
    textures = _textures(2 * size, generator)
    textured = _rand(size, generator) < _TEXTURED
    layer = _moved(torch.cat([colours * opaque, opaque], dim=1), generator)
    colours, opaque = layer[:, :3], layer[:, 3:]
    colours = torch.where(textured, colours * (0.5 + textures[:size].mean(1, keepdim=True)), colours)
    picture = colours + _grounds(textures[size:], generator) * (1 - opaque)
    other = _moved(layer, generator, scale=0.6).roll(1, 0)
    overlaid = other[:, :3] + picture * (1 - other[:, 3:])
    picture = torch.where(_rand(size, generator) < _OVERLAID, overlaid, picture)
    return (picture.clamp(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)


def _recoloured(colours: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mix the colour channels of a random half of the pictures (B, 3, H, W); grey stays grey."""
    size = len(colours)
    mixed = torch.eye(3) + 0.5 * torch.randn(size, 3, 3, generator=generator)
    mixed = mixed / mixed.sum(2, keepdim=True).clamp(min=0.5)
    gamma = torch.exp(0.3 * torch.randn(size, 1, 1, 1, generator=generator))
    changed = torch.einsum("bij,bjhw->bihw", mixed, colours).clamp(0, 1) ** gamma
    return torch.where(_rand(size, generator) < 0.5, changed, colours)


def _moved(layer: torch.Tensor, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    """Rotate, flip, scale and shift layers (B, 4, H, W) with premultiplied alpha."""
    size = len(layer)
    turned, wild, grown, longer, across, down, flipped = torch.randn(7, size, generator=generator)
    angle = torch.where(wild > 1, math.pi * turned, 0.2 * turned)
    factors = torch.exp(0.25 * grown - 0.1) * scale
    stretch = torch.exp(0.12 * longer)
    cosine, sine = torch.cos(angle) / factors, torch.sin(angle) / factors
    mirror = torch.where(flipped > 0, 1.0, -1.0)
    transform = torch.zeros(size, 2, 3)
    transform[:, 0] = torch.stack([mirror * cosine * stretch, -mirror * sine * stretch, 0.2 * across], 1)
    transform[:, 1] = torch.stack([sine / stretch, cosine / stretch, 0.2 * down], 1)
    grid = F.affine_grid(transform, [size, 4, _SIDE, _SIDE], align_corners=False)
    return F.grid_sample(layer, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _grounds(textures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random backgrounds (B, 3, H, W): white, one colour, or `textures` (B, 3, H, W)."""
    drawn = _rand(len(textures), generator)
    plain = torch.rand(len(textures), 3, 1, 1, generator=generator)
    grounds = torch.where(drawn < _WHITE_GROUND + _PLAIN_GROUND, plain, textures)
    return torch.where(drawn < _WHITE_GROUND, torch.ones(()), grounds)


def _textures(size: int, generator: torch.Generator) -> torch.Tensor:
    """Return coloured noise (B, 3, 128, 128), 0 to 1, with a falling power spectrum as in photographs."""
    textures = torch.rand(size, 3, 1, 1, generator=generator).repeat(1, 1, _SIDE, _SIDE)
    strength = 0.3 * torch.rand(size, 1, 1, 1, generator=generator)
    for side in (2, 4, 8, 16, 32, 64):
        grey, colour = torch.randn(size, 4, side, side, generator=generator).split([1, 3], dim=1)
        octave = F.interpolate(grey + 0.4 * colour, (_SIDE, _SIDE), mode="bicubic", align_corners=False)
        textures = textures + octave * strength * (2 / side) ** 0.5
    return textures.clamp(0, 1)


def _rand(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(size, 1, 1, 1, generator=generator)
