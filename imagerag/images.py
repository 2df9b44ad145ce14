"""Convert images to what a viewer shows: upright, in sRGB, on white. All code that reads images uses this module.

Safe decoding is the caller's responsibility; see `corpus.photos` for downloaded images.
"""

import io
from collections.abc import Callable
from functools import cache, lru_cache, partial

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
"""Transformation to upright for each EXIF orientation; 1 and invalid values need none."""

_STRIP_PIXELS = 2**20  # converted at a time: a large image takes twice its memory instead of five times
_MAX_PROFILE_BYTES = 4 * 2**20  # profiles of printers have up to about 3 MiB
_MAX_KEPT_PROFILE_BYTES = 64 * 2**10  # profiles of screens, cameras and phones have less than 20 KiB
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_SRGB = ImageCms.createProfile("sRGB")
_Transforms = Callable[[str], ImageCms.ImageCmsTransform | None]
_SHOWN_AS_STORED = frozenset({"1", "L", "P", "RGB"})


def upright_srgb(image: Image.Image, max_side: int | None = None) -> Image.Image:
    """Return `image` as an upright sRGB image on white, in mode RGB, with at most `max_side` pixels on its longer side.

    Applies the EXIF orientation, converts the ICC profile to sRGB, composites transparency on white, and reduces 16
    bits per channel to 8. Of an animation, the first frame is used. A profile that is broken, or for another colour
    mode than the pixels', is ignored, as browsers do; so is one of more than 4 MiB.

    Raises:
        OSError, SyntaxError, ValueError: if Pillow can't decode the image.
    """
    image.load()
    turn = _TURNS.get(_orientation(image))
    seen = _on_white(image)
    if turn is not None:
        seen = seen.transpose(turn)
    if max_side is not None and max(seen.size) > max_side:
        scale = max_side / max(seen.size)
        width, height = (max(1, round(side * scale)) for side in seen.size)
        seen = seen.resize((width, height), Image.Resampling.BOX)  # averages the pixels that are merged
    if seen is image:
        seen = image.copy()
    seen.info = {}  # so that orientation and profile are not applied twice
    return seen


def is_shown_as_stored(image: Image.Image) -> bool:
    """Return whether the image looks the same to a reader that ignores orientation, profile and transparency."""
    return (
        image.mode in _SHOWN_AS_STORED
        and not image.has_transparency_data
        and _orientation(image) not in _TURNS
        and _is_srgb(image)
    )


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTag.Orientation)
    except (SyntaxError, ValueError, OSError, KeyError):  # a broken EXIF block is ignored
        return _UPRIGHT
    return orientation if isinstance(orientation, int) else _UPRIGHT


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image in sRGB on white, converted strip by strip, or itself if there is nothing to convert."""
    icc_profile = image.info.get("icc_profile")
    if image.mode == "RGB" and not icc_profile and not image.has_transparency_data:
        return image
    seen = Image.new("RGB", image.size)
    transform_from = cache(partial(_to_srgb, icc_profile))  # by mode, which is the same for all strips
    height = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height)))
        seen.paste(_strip_on_white(strip, transform_from), (0, top))
    return seen


def _strip_on_white(strip: Image.Image, transform_from: _Transforms) -> Image.Image:
    alpha = None
    if strip.mode.startswith("I"):  # 16 bits per pixel, which Pillow clips instead of scaling
        strip = Image.fromarray((np.asarray(strip) >> 8).astype(np.uint8))
    if strip.has_transparency_data:
        strip = strip.convert("LA" if strip.mode in ("LA", "La") else "RGBA")
        alpha = strip.getchannel("A")
    if strip.mode not in ("L", "CMYK"):
        strip = strip.convert("L" if strip.mode in ("1", "LA") else "RGB")
    transform = transform_from(strip.mode)
    seen = strip.convert("RGB") if transform is None else transform.apply(strip)
    return seen if alpha is None else Image.composite(seen, Image.new("RGB", seen.size, "white"), alpha)


def _is_srgb(image: Image.Image) -> bool:
    """Return whether the profile, if any, changes every colour by at most one level, in any program."""
    icc_profile = image.info.get("icc_profile")
    if icc_profile and len(icc_profile) > _MAX_PROFILE_BYTES:  # ignored here, but perhaps not elsewhere
        return False
    mode = "RGB" if image.mode in ("RGB", "P") else "L"
    transform = _to_srgb(icc_profile, mode)
    if transform is None:
        return True
    levels = np.arange(0, 256, 17, dtype=np.uint8)  # 16 levels per channel, in all combinations
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    chart = Image.fromarray(colours if mode == "RGB" else colours[..., 0])
    difference = ImageChops.difference(chart.convert("RGB"), transform.apply(chart))
    return int(np.asarray(difference).max()) <= 1


def _to_srgb(icc_profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a profile for pixels of `mode`, or None if there is no usable profile of that mode."""
    if not icc_profile or len(icc_profile) > _MAX_PROFILE_BYTES:
        return None
    return (_kept_transform if len(icc_profile) <= _MAX_KEPT_PROFILE_BYTES else _transform)(icc_profile, mode)


def _transform(icc_profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
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


_kept_transform = lru_cache(maxsize=32)(_transform)
"""Many images have the same profile. The keys of this cache come from the web, so only small ones are kept."""
