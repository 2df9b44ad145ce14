"""Decoding what a stranger calls a picture: which formats, how large, and whether all of it is there."""

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
"""Formats that can be decoded, and Pillow's name of each. HEIC needs the extra `heic`."""

_HEIC_EXTRA = "imagerag-turbo[heic]"
_MORE_DATA = b"\x5a\xa5\x3c" * 64  # of a JPEG's picture: no marker in it


def open_image(stream: IO[bytes], formats: Sequence[ImageFormat], max_pixels: int) -> Image.Image:
    """Read an image's header; decode nothing yet.

    Args:
        formats: those that may be decoded, of `FORMATS`.

    Raises:
        FetchError: if it is of another format, of more than `max_pixels` pixels, or of numbers without a known range.
    """
    plugins = _plugins(tuple(formats))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=plugins)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise FetchError(Reason.TOO_MANY_PIXELS, f"more than {max_pixels} pixels") from None
    except Exception:  # noqa: BLE001 - not identified, or cut off in its header; plug-ins raise what they like
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
    """Decode what `open_image` opened, as `images.upright_srgb` does.

    Raises:
        FetchError: if it is damaged, or there is only a part of it.
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
    """Whether data is missing before the end mark, which libjpeg fills with grey and doesn't tell of.

    Where the last block is of that very grey, more data in front of the end mark tells: in a whole file it is skipped,
    else it shows.
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
    """Pillow's names of those formats that this installation can decode."""
    Image.init()
    if "heic" in formats and find_spec("pillow_heif"):
        import_module("pillow_heif").register_heif_opener()
    return tuple(FORMATS[name] for name in formats if FORMATS[name] in Image.OPEN)
