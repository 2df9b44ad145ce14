"""A picture of any shape in a base model's square."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from imagerag.hspace.fit import FITS, fit_square
from imagerag.retrieval.schema import Fit
from tests.hspace.photos import load_photos

SIDE = 60
WIDE, TALL = (300, 100), (100, 300)
WHITE = (255, 255, 255)


def photo(size: tuple[int, int]) -> Image.Image:
    """A picture whose border has all kinds of colours."""
    width, height = size
    smooth = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)


def thing(size: tuple[int, int], background: str | tuple[int, ...], mode: str = "RGB", margin: int = 0) -> Image.Image:
    """A blue ellipse with a red and a green end, which touches the border where there is no margin."""
    width, height = size
    image = Image.new(mode, size, background)
    draw = ImageDraw.Draw(image)
    draw.ellipse((margin, margin, width - 1 - margin, height - 1 - margin), fill="blue")
    end = 20
    if width > height:
        first, last = (margin, height // 2 - 5), (width - margin - end, height // 2 - 5)
    else:
        first, last = (width // 2 - 5, margin), (width // 2 - 5, height - margin - end)
    for (left, top), colour in ((first, "red"), (last, "green")):
        draw.rectangle((left, top, left + end - 1, top + end - 1), fill=colour)
    return image


def as_jpeg(image: Image.Image, quality: int = 60) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def as_png(image: Image.Image, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return Image.open(buffer)


def shows_both_ends(square: Image.Image) -> bool:
    red, green, blue = np.moveaxis(np.asarray(square, int), 2, 0)
    has_red = ((red > 200) & (green < 90) & (blue < 90)).any()
    has_green = ((green > 90) & (red < 90) & (blue < 90)).any()
    return bool(has_red and has_green)


def same(one: Image.Image, two: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(200, 200), (7, 7), (SIDE, SIDE)])
def test_a_square_picture_is_the_same_by_every_fit(fit: Fit, size: tuple[int, int]) -> None:
    for image in (photo(size), thing(size, (0, 0, 0, 0), "RGBA")):
        assert same(fit_square(image, SIDE, fit), fit_square(image, SIDE, "crop"))
    assert same(fit_square(photo((SIDE, SIDE)), SIDE, fit), photo((SIDE, SIDE)))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(300, 100), (100, 300), (1, 40), (40, 1), (1, 1), (1, 5000), (61, 60), (59, 1000)])
@pytest.mark.parametrize("side", [8, 60, 512])
def test_what_comes_out_is_a_square(fit: Fit, size: tuple[int, int], side: int) -> None:
    square = fit_square(photo(size), side, fit)
    assert (square.size, square.mode) == ((side, side), "RGB")


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("margin", [0, 6])
def test_a_thing_on_a_plain_or_transparent_ground_is_shown_as_a_whole(size: tuple[int, int], margin: int) -> None:
    grey = (190, 195, 200)
    for image, expected in (
        (thing(size, (9, 9, 9, 0), "RGBA", margin), WHITE),
        (thing(size, grey, margin=margin), grey),
        (as_jpeg(thing(size, grey, margin=margin)), grey),
        (as_jpeg(thing(size, "white", margin=margin), quality=30), WHITE),
        (thing(size, "black", margin=margin), (0, 0, 0)),
    ):
        fitted = fit_square(image, SIDE, "auto")
        assert shows_both_ends(fitted)
        corner = np.asarray(fitted, int)[0, 0]
        assert np.abs(corner - expected).max() <= 3, "the padding's colour"
        assert same(fitted, fit_square(image, SIDE, "pad"))
        assert not shows_both_ends(fit_square(image, SIDE, "crop"))


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_a_photograph_that_fills_its_border_is_cropped(size: tuple[int, int]) -> None:
    for image in (photo(size), as_jpeg(photo(size))):
        fitted = fit_square(image, SIDE, "auto")
        assert same(fitted, fit_square(image, SIDE, "crop"))
        middle = [(size[0] - 100) // 2, (size[1] - 100) // 2]
        expected = image.convert("RGB").crop((*middle, middle[0] + 100, middle[1] + 100))
        difference = np.asarray(fitted, int) - np.asarray(expected.resize((SIDE, SIDE), Image.Resampling.BICUBIC), int)
        assert np.abs(difference).max() <= 8, "but for what lies beside the edges"


def test_photographs_of_things_are_shown_as_a_whole_where_they_were_cut_out() -> None:
    photos = load_photos()
    assert len(photos) == 12
    for name, photo in photos.items():
        wanted: Fit = "pad" if photo.mode == "RGBA" else "crop"
        assert same(fit_square(photo, SIDE, "auto"), fit_square(photo, SIDE, wanted)), name
    num_cropped = sum(
        not same(fit_square(each, SIDE, "pad"), fit_square(each, SIDE, "crop")) for each in photos.values()
    )
    assert num_cropped == 10, "all but the two that are square"


def test_a_photograph_under_a_plain_sky_is_cropped() -> None:
    image = photo(WIDE)
    image.paste("white", (0, 0, 300, 40))
    assert same(fit_square(image, SIDE, "auto"), fit_square(image, SIDE, "crop"))


def test_a_padded_picture_lies_in_the_middle_and_keeps_its_shape() -> None:
    image = Image.new("RGB", WIDE, "red")
    square = np.asarray(fit_square(image.convert("RGBA"), SIDE, "pad"))
    assert (square == (255, 0, 0)).all(), "on the colour of its border"
    image.putalpha(Image.new("L", WIDE, 255))
    image.paste((0, 0, 0, 0), (0, 0, 300, 20))
    rows = np.flatnonzero((np.asarray(fit_square(image, SIDE, "pad"))[:, :, 1] < 128).any(1))
    assert (rows[0], rows[-1]) == (24, 39), "20 of 60 rows, of which the first four are transparent"


def test_a_trimmed_cut_out_is_shown_as_a_whole_whatever_touches_its_border() -> None:
    """A bus fills most of its picture; what shows that it was cut out is the ground between its wheels."""
    bus = thing(WIDE, (200, 60, 10, 255), "RGBA")
    bus.paste((0, 0, 0, 0), (60, 90, 240, 100))
    fitted = fit_square(bus, SIDE, "auto")
    assert shows_both_ends(fitted)
    assert fitted.getpixel((0, 0)) == WHITE
    rounded = photo(WIDE).convert("RGBA")
    for corner in ((0, 0), (299, 0), (0, 99), (299, 99)):
        rounded.putpixel(corner, (0, 0, 0, 0))
    assert same(fit_square(rounded, SIDE, "auto"), fit_square(rounded, SIDE, "crop")), "round corners are no cut-out"


def test_every_mode_is_fitted_by_what_is_seen() -> None:
    cut_out = thing(WIDE, (0, 0, 0, 0), "RGBA")
    palette = as_png(cut_out.quantize(16))
    assert (palette.mode, palette.has_transparency_data) == ("P", True)
    assert shows_both_ends(fit_square(palette, SIDE, "auto"))
    assert fit_square(palette, SIDE, "auto").getpixel((0, 0)) == WHITE
    ink = thing(WIDE, "white").convert("CMYK")
    assert shows_both_ends(fit_square(as_jpeg(ink, 90), SIDE, "auto"))

    grey = cut_out.convert("LA")
    deep = Image.fromarray(np.asarray(thing(WIDE, "white").convert("L")).astype(np.uint16) << 8)
    assert deep.mode == "I;16"
    for image in (grey, as_png(grey), deep, as_png(deep)):
        fitted = np.asarray(fit_square(image, SIDE, "auto"))
        assert (fitted[:15] == 255).all(), "padded with white"
        ends = fitted[SIDE // 2, [1, -3], 0].tolist()
        assert [abs(own - wanted) < 30 for own, wanted in zip(ends, (76, 75), strict=True)] == [True, True]


def test_a_picture_on_its_side_is_fitted_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    buffer = io.BytesIO()
    thing(WIDE, "white").save(buffer, "PNG", exif=exif)
    fitted = np.asarray(fit_square(Image.open(buffer), SIDE, "auto"))
    assert (fitted[:, 0] == 255).all(), "it is tall, so that its sides are padded"
    assert (fitted[0] != 255).any()
