"""A stranger's picture as people see it: upright, in sRGB, on white. Whatever reads pictures reads them through this.

Decoding itself, and what of it is safe, is the caller's: see `corpus.guard` for pictures of the network.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms
from PIL.ExifTags import Base as ExifTag

_UPRIGHT = 1
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation; 1 and numbers that EXIF doesn't have leave it as it is."""

_STRIP_PIXELS = 2**20  # converted at a time, so that a large picture is in memory twice and not five times
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_SRGB = ImageCms.createProfile("sRGB")
_SHOWN_AS_STORED = frozenset({"1", "L", "P", "RGB"})


def upright_srgb(image: Image.Image, max_side: int | None = None) -> Image.Image:
    """Return `image` as people see it, mode RGB, at its size or with `max_side` pixels on its longer side at most.

    Its EXIF orientation is applied, its ICC profile is converted to sRGB, transparency is put on white, and 16 bits a
    channel become 8. An animation gives its first picture. A profile that is broken, or of another kind than the
    pixels are, is left out of account, as browsers do.

    Raises:
        OSError, SyntaxError, ValueError: as Pillow does for what it can't decode.
    """
    image.load()
    turn = _TURNS.get(_orientation(image))
    seen = _on_white(image)
    if turn is not None:
        seen = seen.transpose(turn)
    if max_side is not None and max(seen.size) > max_side:
        scale = max_side / max(seen.size)
        width, height = (max(1, round(side * scale)) for side in seen.size)
        seen = seen.resize((width, height), Image.Resampling.BOX)  # the mean of the pixels that become one
    if seen is image:
        seen = image.copy()
    seen.info = {}  # what was applied must not be applied again
    return seen


def is_shown_as_stored(image: Image.Image) -> bool:
    """Whether a reader that knows nothing of orientation, profiles and transparency sees what people see."""
    return (
        image.mode in _SHOWN_AS_STORED
        and not image.has_transparency_data
        and _orientation(image) not in _TURNS
        and _is_srgb(image)
    )


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTag.Orientation)
    except (SyntaxError, ValueError, OSError, KeyError):  # of a broken EXIF block nothing is believed
        return _UPRIGHT
    return orientation if isinstance(orientation, int) else _UPRIGHT


def _on_white(image: Image.Image) -> Image.Image:
    """The picture as sRGB, strip by strip, or itself where there is nothing to convert."""
    icc_profile = image.info.get("icc_profile")
    if image.mode == "RGB" and not icc_profile and not image.has_transparency_data:
        return image
    seen = Image.new("RGB", image.size)
    height = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height)))
        seen.paste(_strip_on_white(strip, icc_profile), (0, top))
    return seen


def _strip_on_white(strip: Image.Image, icc_profile: bytes | None) -> Image.Image:
    alpha = None
    if strip.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip instead of scale
        strip = Image.fromarray((np.asarray(strip) >> 8).astype(np.uint8))
    if strip.has_transparency_data:
        strip = strip.convert("LA" if strip.mode in ("LA", "La") else "RGBA")
        alpha = strip.getchannel("A")
    if strip.mode not in ("L", "CMYK"):
        strip = strip.convert("L" if strip.mode in ("1", "LA") else "RGB")
    transform = _to_srgb(icc_profile, strip.mode) if icc_profile else None
    seen = strip.convert("RGB") if transform is None else transform.apply(strip)
    return seen if alpha is None else Image.composite(seen, Image.new("RGB", seen.size, "white"), alpha)


def _is_srgb(image: Image.Image) -> bool:
    """Whether the profile, if there is one, changes no colour by more than a level."""
    icc_profile = image.info.get("icc_profile")
    mode = "RGB" if image.mode in ("RGB", "P") else "L"
    transform = _to_srgb(icc_profile, mode) if icc_profile else None
    if transform is None:
        return True
    levels = np.arange(0, 256, 17, dtype=np.uint8)  # 16, of every channel with every other
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    chart = Image.fromarray(colours if mode == "RGB" else colours[..., 0])
    difference = ImageChops.difference(chart.convert("RGB"), transform.apply(chart))
    return int(np.asarray(difference).max()) <= 1


@lru_cache(maxsize=32)
def _to_srgb(icc_profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a profile for pixels of `mode`; None where the profile is unusable or of another mode."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        if _PROFILE_MODES.get(profile.profile.xcolor_space) != mode:
            return None
        return ImageCms.buildTransform(
            profile,
            _SRGB,
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError):
        return None
