"""HEIC files, and what has to come of each, made by pillow-heif itself.

It writes an orientation as HEIC has it: as a turn, which every reader applies by itself.
"""

import io
import re
import struct
from functools import cache

import numpy as np
import pillow_heif
from PIL import Image

from tests.corpus import photos
from tests.corpus.fetched import Fetched
from tests.corpus.photos import encoded, in_profile, scene, turned

pillow_heif.register_heif_opener()  # to write it

SMALL = (60, 90)
SHOWN = {"size": SMALL, "seen": lambda: scene(SMALL)}


@cache
def _photo() -> bytes:
    return encoded(scene(), "HEIF", quality=80)


def _translucent() -> Image.Image:
    image = scene(SMALL).convert("RGBA")
    image.putalpha(_alpha())
    return image


def _alpha() -> Image.Image:
    return Image.linear_gradient("L").resize(SMALL)


def _twelve_bits() -> bytes:
    pixels = np.asarray(scene(SMALL)).astype(np.uint16) * 257
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", SMALL, pixels.tobytes()).save(file, quality=90)
    return file.getvalue()


def _of_a_lying_size() -> bytes:
    return re.sub(rb"(ispe....).{8}", lambda ispe: ispe[1] + struct.pack(">II", 16, 16), _photo(), flags=re.DOTALL)


HEIC = [
    Fetched(what="HEIC", file=lambda: encoded(scene(SMALL), "HEIF", quality=90), **SHOWN, is_kept=False),
    Fetched(what="a large HEIC", file=_photo, size=(160, 256), seen=scene),
    *(
        Fetched(
            what=f"HEIC with orientation {orientation}",
            file=lambda o=orientation: turned(o, SMALL, "HEIF"),
            **SHOWN,
            within=6,
        )
        for orientation in range(1, 9)
    ),
    Fetched(
        what="HEIC in Display P3",
        file=lambda: encoded(in_profile(scene(SMALL), photos.P3), "HEIF", quality=90, icc_profile=photos.P3),
        **SHOWN,
    ),
    Fetched(
        what="HEIC with transparency",
        file=lambda: encoded(_translucent(), "HEIF", quality=90),
        size=SMALL,
        seen=lambda: Image.composite(scene(SMALL), Image.new("RGB", SMALL, "white"), _alpha()),
    ),
    Fetched(what="HEIC with more than 8 bits a channel", file=_twelve_bits, **SHOWN),
    Fetched(
        what="several pictures in one HEIC",
        file=lambda: encoded(scene(SMALL), "HEIF", save_all=True, append_images=[scene(SMALL, seed=1)]),
        **SHOWN,
    ),
    Fetched(what="half a HEIC", file=lambda: _photo()[: len(_photo()) // 2], outcome="corrupt_image"),
    Fetched(what="a HEIC's header", file=lambda: _photo()[:30], outcome="corrupt_image", detail="HEIC"),
    Fetched(what="a HEIC larger than it says", file=_of_a_lying_size, outcome="corrupt_image", detail="limit"),
    Fetched(
        what="a HEIC of too many pixels",
        file=lambda: encoded(Image.new("RGB", (402, 642)), "HEIF"),
        outcome="too_many_pixels",
        detail="402x642",
    ),
]
