import io
import struct
import zlib

import pytest

from imagerag.corpus.guard import FetchError, Reason, reason_of
from imagerag.corpus.photos import FORMATS, decode, open_image
from tests.corpus.photos import encoded, scene, with_end_mark
from tests.corpus.web import picture


def rejection(file: bytes, max_pixels: int = 50_000_000, formats: tuple[str, ...] = tuple(FORMATS)) -> Reason:
    with pytest.raises(FetchError) as caught:
        open_image(io.BytesIO(file), formats, max_pixels)  # type: ignore[arg-type]
    return reason_of(str(caught.value))


def test_the_pixels_of_the_header_count() -> None:
    assert open_image(io.BytesIO(picture(1, (30, 20))), ("jpeg",), 600).size == (30, 20)
    assert rejection(picture(1, (30, 20)), max_pixels=599) is Reason.TOO_MANY_PIXELS
    assert rejection(_png_header(30_000, 30_000)) is Reason.TOO_MANY_PIXELS
    assert rejection(_png_header(2**31 - 1, 2**31 - 1)) is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP"])
def test_formats_can_be_switched_off(image_format: str) -> None:
    file, name = picture(1, image_format=image_format), image_format.lower()
    assert open_image(io.BytesIO(file), (name,), 10_000).format == image_format  # type: ignore[arg-type]
    others = tuple(other for other in FORMATS if other != name)
    assert rejection(file, formats=others) is Reason.UNSUPPORTED_FORMAT


def test_a_damaged_header_is_a_corrupt_image() -> None:
    assert rejection(picture(1)[:15]) is Reason.CORRUPT_IMAGE
    assert rejection(_png_header(4, 4, checksum=0)) is Reason.CORRUPT_IMAGE


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"subsampling": 0}, {"optimize": True}])
def test_half_a_jpeg_is_told_from_one_that_is_grey_below(share: float, options: dict[str, object]) -> None:
    whole = scene().copy()
    half = with_end_mark(encoded(whole, **options), share)
    with pytest.raises(FetchError, match="corrupt_image: its data ends early"):
        decode(open_image(io.BytesIO(half), ("jpeg",), 10**6), io.BytesIO(half), 256)
    whole.paste((128, 128, 128), (0, 300, *whole.size))
    file = encoded(whole, **options)
    decode(open_image(io.BytesIO(file), ("jpeg",), 10**6), io.BytesIO(file), 256)


def test_heic_without_its_library_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagerag.corpus.photos._plugins", lambda formats: ("JPEG",))
    with pytest.raises(FetchError, match=r"unsupported_format: HEIC, which needs `pip install imagerag-turbo\[heic\]`"):
        open_image(io.BytesIO(b"\0\0\0\x18ftypheic" + bytes(20)), ("jpeg", "heic"), 100)


def _png_header(width: int, height: int, *, checksum: int | None = None) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"")
    chunks = [(header, zlib.crc32(header) if checksum is None else checksum), (body, zlib.crc32(body))]
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", crc) for chunk, crc in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
