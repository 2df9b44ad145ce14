"""Decoding of untrusted images, with checks of their format, size and completeness."""

import io
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import IO

from PIL import Image, ImageChops

from imagerag.corpus.config import ImageFormat
from imagerag.corpus.guard import FetchError, Reason
from imagerag.corpus.sniff import HEAD_BYTES, seems
from imagerag.images import upright_srgb

FORMATS: dict[str, str] = {
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "avif": "AVIF",
    "heic": "HEIF",
    "tiff": "TIFF",
    "bmp": "BMP",
}
"""Formats that can be decoded, with Pillow's name of each. HEIC requires the extra `heic`."""

_HEIC_EXTRA = "imagerag-turbo[heic]"
_MORE_DATA = b"\x5a\xa5\x3c" * 64  # JPEG image data that contains no marker


def open_image(stream: IO[bytes], formats: Sequence[ImageFormat], max_pixels: int) -> Image.Image:
    """Read an image's header without decoding its pixels.

    Args:
        formats: accepted formats, keys of `FORMATS`.

    Raises:
        FetchError: if it has another format, more than `max_pixels` pixels, or pixel values of 32 bits.
    """
    plugins = _plugins(tuple(formats))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=plugins)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise FetchError(Reason.TOO_MANY_PIXELS, f"more than {max_pixels} pixels") from None
    except Exception:  # noqa: BLE001 - not identified, or truncated in its header; plug-ins raise any exception
        stream.seek(0)
        kind = seems(stream.read(HEAD_BYTES))
        if FORMATS.get(kind.lower()) in plugins:
            raise FetchError(Reason.CORRUPT_IMAGE, f"unreadable header of a {kind}") from None
        if kind.lower() in formats:
            raise FetchError(Reason.UNSUPPORTED_FORMAT, f"{kind}, which needs `pip install {_HEIC_EXTRA}`") from None
        raise FetchError(Reason.UNSUPPORTED_FORMAT, f"{kind}; taken are {', '.join(formats)}") from None
    if image.width * image.height > max_pixels:
        raise FetchError(Reason.TOO_MANY_PIXELS, f"{image.width}x{image.height} is more than {max_pixels} pixels")
    if image.mode in ("I", "F"):
        raise FetchError(Reason.UNSUPPORTED_FORMAT, f"{image.format} with 32 bits a channel")
    return image


def decode(image: Image.Image, stream: IO[bytes], max_side: int) -> Image.Image:
    """Decode an image from `open_image` with `images.upright_srgb`.

    Raises:
        FetchError: if it is damaged or truncated.
    """
    try:
        decoded = upright_srgb(image, max_side)
        half = image.format == "JPEG" and _is_half_a_jpeg(image, stream)
    except Exception as error:
        raise FetchError(Reason.CORRUPT_IMAGE, str(error) or type(error).__name__) from error
    if half:
        raise FetchError(Reason.CORRUPT_IMAGE, "its data ends early: the rest would be grey")
    return decoded


def _is_half_a_jpeg(image: Image.Image, stream: IO[bytes]) -> bool:
    """Return whether image data is missing before the end marker, which libjpeg silently fills with grey.

    If the last block is of exactly that grey, the image is decoded again with more data before the end marker: in a
    complete file it is skipped, in a truncated one it changes the image.
    """
    corner = image.crop((max(0, image.width - 8), max(0, image.height - 8), *image.size))
    if corner.convert("RGB").getextrema() != ((128, 128),) * 3:
        return False
    stream.seek(0)
    data = stream.read()
    end = data.rfind(b"\xff\xd9")
    as_it_is, longer = (_small(variant) for variant in (data, data[:end] + _MORE_DATA + data[end:]))
    return ImageChops.difference(as_it_is, longer).getbbox() is not None


def _small(jpeg: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(jpeg), formats=["JPEG"])
    image.draft("RGB", (image.width // 8, image.height // 8))
    return image.convert("RGB")


@cache
def _plugins(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Return Pillow's names of those formats that this installation can decode."""
    Image.init()
    if "heic" in formats and find_spec("pillow_heif"):
        import_module("pillow_heif").register_heif_opener()
    return tuple(FORMATS[name] for name in formats if FORMATS[name] in Image.OPEN)
