"""Fitting of pictures of any shape into squares, by cropping or padding. Independent of models."""

from typing import get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from imagerag.embedding.encoder import to_rgb
from imagerag.retrieval.schema import Fit

FITS: tuple[Fit, ...] = get_args(Fit)
DEFAULT_FIT: Fit = "auto"

_TOLERANCE = 24
"""Colour tolerance (0 to 255) for JPEG noise and uneven studio lighting."""
_PLAIN_SHARE = 2 / 3
"""Minimum share of border pixels near one colour; the subject may touch the border."""
_TRANSPARENT_SHARE = 0.1
"""Minimum share of transparent border pixels. Trimmed cutouts touch all four sides; rounded corners of screenshots must
not count."""

Pixels = npt.NDArray[np.uint8]


def fit_square(image: Image.Image, side: int, fit: Fit) -> Image.Image:
    """Return a picture as an upright RGB square of `side` pixels, with white for transparency.

    `fit` makes no difference for square pictures.

    Args:
        image: a picture of any shape.
        side: side of the square in pixels.
        fit: `crop` keeps the centre square. `pad` keeps the whole picture and fills the square with its border's
            colour, or white if the border is transparent. `auto` pads pictures with a transparent or single-colour
            border, which show a whole object, and crops all others.
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
    """Return the background colour (3,) of `image`, whose RGB version is `picture`; None without a plain border."""
    if image.has_transparency_data:
        alpha = _border(np.asarray(image.convert("RGBA").getchannel("A")))
        if (alpha < 128).mean() >= _TRANSPARENT_SHARE:
            return np.full(3, 255, np.uint8)
    border = _border(np.asarray(picture))
    colour = _usual(border)
    distance = np.abs(border.astype(np.int16) - colour).max(axis=1)
    return colour if (distance <= _TOLERANCE).mean() >= _PLAIN_SHARE else None


def _border(pixels: Pixels) -> Pixels:
    """Return the border pixels (N, ...) of a picture (H, W, ...)."""
    sides: Pixels = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return sides


def _usual(colours: Pixels) -> Pixels:
    """Return the median colour (3,) of colours (N, 3)."""
    usual: Pixels = np.median(colours, axis=0).astype(np.uint8)
    return usual


def _pad(picture: Image.Image, side: int, background: Pixels) -> Image.Image:
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    square = Image.new("RGB", (side, side), tuple(background.tolist()))
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square
