import io
import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from imagerag.images import is_shown_as_stored, upright_srgb
from tests.corpus.photos import ADOBE_RGB, P3, TURNS, encoded, in_profile, scene, turned


def levels_apart(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(np.asarray(first, int) - np.asarray(second, int)).max())


@pytest.mark.parametrize("profile", [P3, ADOBE_RGB])
@pytest.mark.parametrize("max_side", [None, 100])
def test_a_picture_in_another_profile_is_its_srgb_copy_within_two_levels(profile: bytes, max_side: int | None) -> None:
    # Not the most saturated colours: there, eight bits of a wider space are coarser than eight bits of sRGB.
    copy = Image.blend(scene(), Image.new("RGB", scene().size, (128, 128, 128)), 0.5)
    file = encoded(in_profile(copy, profile), "PNG", icc_profile=profile)
    seen = upright_srgb(Image.open(io.BytesIO(file)), max_side)
    assert levels_apart(seen, upright_srgb(copy, max_side)) <= 2
    untouched = Image.open(io.BytesIO(file)).convert("RGB").resize(seen.size, Image.Resampling.BOX)
    assert levels_apart(seen, untouched) > 5, "the test shows nothing"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("max_side", [None, 64])
def test_all_orientations(orientation: int, max_side: int | None) -> None:
    image = Image.open(io.BytesIO(turned(orientation, (40, 65), "PNG")))
    seen = upright_srgb(image, max_side)
    assert levels_apart(seen, upright_srgb(scene((40, 65)), max_side)) == 0
    assert image.size == TURNS[orientation](scene((40, 65))).size, "the argument is changed"
    assert is_shown_as_stored(image) is (orientation == 1)


@pytest.mark.parametrize("orientation", [1, 6])
def test_once_is_as_good_as_twice(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(in_profile(scene(), P3), "PNG", icc_profile=P3, exif=exif)
    once = upright_srgb(Image.open(io.BytesIO(file)))
    assert levels_apart(upright_srgb(once), once) == 0
    assert is_shown_as_stored(once)


@pytest.mark.parametrize("num_bytes", [0, 2 * 2**20, 5 * 2**20])
def test_a_large_profile_is_applied_and_a_huge_one_is_not(num_bytes: int) -> None:
    copy = Image.blend(scene(), Image.new("RGB", scene().size, (128, 128, 128)), 0.5)
    stored = in_profile(copy, P3)
    image = Image.open(io.BytesIO(encoded(stored, "WEBP", icc_profile=P3 + bytes(num_bytes))))
    assert levels_apart(upright_srgb(image), stored if num_bytes > 4 * 2**20 else copy) <= 2
    assert levels_apart(stored, copy) > 5, "the test shows nothing"
    assert not is_shown_as_stored(image)


@pytest.mark.parametrize("num_bytes", [2 * 2**20, 15 * 2**20])
def test_profiles_of_images_seen_before_take_no_memory(num_bytes: int) -> None:
    padding = bytes(num_bytes)

    def seen(icc_profile: bytes) -> Image.Image:
        file = encoded(Image.new("RGB", (16, 16)), "WEBP", icc_profile=icc_profile)
        return upright_srgb(Image.open(io.BytesIO(file)))

    seen(P3)
    tracemalloc.start()
    try:
        for _ in range(10):
            seen(P3 + os.urandom(16) + padding)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < num_bytes
