"""Photos as people's files are, made anew at every run: turned by EXIF, in other colours, cut, in other formats."""

import io
import struct
import zlib
from base64 import b85decode
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
_ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
TURNS: dict[int, Callable[[Image.Image], Image.Image]] = {
    # How the file of an upright picture is stored, by the EXIF orientation that makes it upright again.
    1: lambda upright: upright,
    2: lambda upright: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda upright: upright.transpose(Image.Transpose.ROTATE_180),
    4: lambda upright: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda upright: upright.transpose(Image.Transpose.TRANSPOSE),
    6: lambda upright: upright.transpose(Image.Transpose.ROTATE_90),
    7: lambda upright: upright.transpose(Image.Transpose.TRANSVERSE),
    8: lambda upright: upright.transpose(Image.Transpose.ROTATE_270),
}


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


@cache
def scene(size: tuple[int, int] = (400, 640), seed: int = 0) -> Image.Image:
    """A smooth picture that is another one however it is turned."""
    coarse = np.random.default_rng(seed).integers(30, 226, (4, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    if image_format == "JPEG":
        options = {"quality": 95} | options
    if image_format == "WEBP":
        options = {"lossless": True} | options
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def turned(orientation: int, size: tuple[int, int] = (400, 640), image_format: str = "JPEG") -> bytes:
    """A file of `scene(size)` that has to be turned to be upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(TURNS.get(orientation, TURNS[1])(scene(size)), image_format, exif=exif.tobytes())


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of a display or a printer."""
    body, table, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s12s4s", offset + len(body), b"", 0x04300000, kind, space, connection, b"", b"acsp")
    head = head.ljust(64, b"\0") + struct.pack(">I", 0) + _fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def display(primaries: tuple[tuple[float, ...], ...], curve: tuple[float, ...]) -> bytes:
    """A profile with the primaries as XYZ (D50), and one curve: a gamma, or the five parameters of sRGB's kind."""
    curve_tag = b"para\0\0\0\0" + struct.pack(">HH", 3 if len(curve) == 5 else 0, 0) + _fixed(*curve)
    colours = {
        name: b"XYZ \0\0\0\0" + _fixed(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve_tag)
    return profile(b"RGB ", b"XYZ ", {b"wtpt": b"XYZ \0\0\0\0" + _fixed(0.9642, 1.0, 0.8249), **colours, **curves})


def grey_profile(gamma: float) -> bytes:
    curve = b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + _fixed(gamma)
    return profile(b"GRAY", b"XYZ ", {b"wtpt": b"XYZ \0\0\0\0" + _fixed(0.9642, 1.0, 0.8249), b"kTRC": curve})


def inks(colours: list[tuple[int, int, int]]) -> bytes:
    """A CMYK profile: sRGB colours of the 16 mixtures of full inks, black changing fastest, then yellow."""
    to_lab = ImageCms.buildTransform(SRGB, ImageCms.createProfile("LAB"), "RGB", "LAB")
    patches = Image.new("RGB", (16, 1))
    patches.putdata(colours)
    lab = np.asarray(to_lab.apply(patches)).reshape(16, 3).copy()
    lab[:, 1:] += 128  # Pillow's a and b are signed
    identity = struct.pack(">9i", *(65536 * int(i % 4 == 0) for i in range(9)))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + lab.tobytes() + 3 * ramp
    return profile(b"CMYK", b"Lab ", {b"wtpt": b"XYZ \0\0\0\0" + _fixed(0.9642, 1.0, 0.8249), b"A2B0": lut})


P3 = display(_P3, _SRGB_CURVE)
ADOBE_RGB = display(_ADOBE, (2.19921875,))
GREY_LINEAR = grey_profile(1.0)


def in_profile(image: Image.Image, icc_profile: bytes) -> Image.Image:
    """The pixels that show the sRGB picture where they are read by another profile."""
    target = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
    return ImageCms.profileToProfile(image, SRGB, target, renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC)


def png(pixels: np.ndarray, colour_type: int, **chunks: bytes) -> bytes:
    """A PNG of pixels (H, W, C), 8 or 16 bits a channel, for what Pillow doesn't write."""
    depth = 8 * pixels.dtype.itemsize
    rows = b"".join(b"\0" + row.astype(f">u{pixels.dtype.itemsize}").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *((name.encode(), data) for name, data in chunks.items())]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def with_end_mark(jpeg: bytes, share: float) -> bytes:
    """The first part of a JPEG as a server's broken tool leaves it: with the end mark behind it."""
    return jpeg[: int(len(jpeg) * share)] + b"\xff\xd9"


ARITHMETIC = b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00smF1_cBL1_cHO2L=cV5DE$j2?`Vr4-60&6c`v66c!d59VH(c8zUSR79cDjBPJ&)D"
    "k&KsEif%8FeNA{DF534LjeZ|2MP!Z6AB6wC>j<TC@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@"
    "3f>C@BBQ01*fPAOJ7}0U`hb5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zfTVC3VC8Oy#<Q-kss*zbcI6`BZrgI6C3A^b"
    "ZaoZ_$=s??C+PzWA>!mW>T78L7OPWjZ4{{ZRp&Cqoch&j<z(&z>!n&trS&fQn*b>>=@%gUZ>ISiQj+8|uVTym7wRdB5jFz*D"
    "P{0U5%`&~yaBR(w8pbjlwiM>L}b(m#br0xOKYNVQ-ixL_a_$jm_9Y<}gz*MfOuXUY{thAR3_+Nfzgaa6?#3;9{9ZT|`jMT7$"
    "OZ6DPTwR2VdH(=<z&e0sr{P3R8Fl(9pOHNx3LhO>?7I|=uATR_A;H2OTE6eMZUd;b0O~81V+KiNfdAP"
)
"""`scene((48, 32))` as an arithmetic JPEG, which Pillow reads and doesn't write: by `cjpeg -quality 80 -arithmetic`."""
