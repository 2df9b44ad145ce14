"""How a picture of any shape becomes the square that a base model sees. Knows nothing of models."""

from typing import get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from imagerag.embedding.encoder import to_rgb
from imagerag.retrieval.schema import Fit

FITS: tuple[Fit, ...] = get_args(Fit)
DEFAULT_FIT: Fit = "auto"

_TOLERANCE = 24
"""Of 255: JPEG's noise beside an edge, and a studio's light that is not quite even."""
_PLAIN_SHARE = 2 / 3
"""Of the border that has one colour: what is shown may touch it."""
_TRANSPARENT_SHARE = 0.1
"""Of the border of a cut-out: one that was trimmed touches all four sides, while a screenshot has round corners."""

Pixels = npt.NDArray[np.uint8]


def fit_square(image: Image.Image, side: int, fit: Fit) -> Image.Image:
    """Return a picture as RGB in a square of `side` pixels, upright, on white where it is transparent.

    A square picture is the same by every `fit`.

    Args:
        fit: `crop` keeps the middle square. `pad` keeps all of the picture, and fills the square with the colour of its
            border, or with white where that is transparent. `auto` pads a picture whose border is transparent or of
            one colour, which shows one thing as a whole, and crops any other.
    """
    picture = to_rgb(image)
    if fit != "crop" and picture.width != picture.height:
        background = _background(image, picture)
        if background is None and fit == "pad":
            background = _usual(_border(np.asarray(picture)))
        if background is not None:
            return _pad(picture, side, background)
    return ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)


def _background(image: Image.Image, picture: Image.Image) -> Pixels | None:
    """Return the colour (3,) that surrounds what `image` shows, if it has one; `picture` is the same as RGB."""
    if image.has_transparency_data:
        alpha = _border(np.asarray(image.convert("RGBA").getchannel("A")))
        if (alpha < 128).mean() >= _TRANSPARENT_SHARE:
            return np.full(3, 255, np.uint8)
    border = _border(np.asarray(picture))
    colour = _usual(border)
    distance = np.abs(border.astype(np.int16) - colour).max(axis=1)
    return colour if (distance <= _TOLERANCE).mean() >= _PLAIN_SHARE else None


def _border(pixels: Pixels) -> Pixels:
    """Return the pixels (N, ...) of the four sides of a picture (H, W, ...)."""
    sides: Pixels = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return sides


def _usual(colours: Pixels) -> Pixels:
    """Return the colour (3,) that most of the colours (N, 3) are near, where there is one."""
    usual: Pixels = np.median(colours, axis=0).astype(np.uint8)
    return usual


def _pad(picture: Image.Image, side: int, background: Pixels) -> Image.Image:
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    square = Image.new("RGB", (side, side), tuple(background.tolist()))
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square
