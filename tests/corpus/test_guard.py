import io
import struct
import zlib

import pytest
from PIL import Image

from imagerag.corpus.guard import FetchError, Reason, check_image, is_public, reason_of
from tests.corpus.web import picture


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.0.192",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "203.0.113.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::10.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::8.8.8.8",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::"],
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (str(FetchError(Reason.TIMEOUT, "timed out")), Reason.TIMEOUT),
        ("http_status: 404", Reason.HTTP_STATUS),
        ("hash mismatch", Reason.HASH_MISMATCH),
        ("Use of image disallowed by X-Robots-Tag directive", Reason.OPT_OUT),
        ("unknown url type: 'nonsense'", Reason.BLOCKED_SCHEME),
        ("something new", Reason.OTHER),
        ("", Reason.OTHER),
        (None, Reason.OTHER),
    ],
)
def test_every_message_has_a_reason(message: str | None, reason: Reason) -> None:
    assert reason_of(message) is reason


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_images_pass(image_format: str) -> None:
    check_image(io.BytesIO(picture(1, (30, 20), image_format)), max_pixels=600)


def rejection(file: bytes, max_pixels: int = 50_000_000) -> Reason:
    with pytest.raises(FetchError) as caught:
        check_image(io.BytesIO(file), max_pixels)
    return reason_of(str(caught.value))


def test_the_pixels_of_the_header_count() -> None:
    assert rejection(picture(1, (30, 20)), max_pixels=599) is Reason.TOO_MANY_PIXELS
    assert rejection(_png_header(30_000, 30_000, bit_depth=8)) is Reason.TOO_MANY_PIXELS
    assert rejection(_png_header(2**31 - 1, 2**31 - 1, bit_depth=8)) is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"<html>not an image</html>",
        b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
        picture(1, image_format="GIF"),
        picture(1, image_format="TIFF"),
        picture(1, image_format="BMP"),
        picture(1, image_format="PPM"),
    ],
)
def test_other_formats_are_refused(file: bytes) -> None:
    assert rejection(file) is Reason.UNSUPPORTED_FORMAT


def test_sixteen_bits_a_channel_are_refused() -> None:
    file = io.BytesIO()
    Image.new("I;16", (4, 4), 40_000).save(file, "PNG")
    assert rejection(file.getvalue()) is Reason.UNSUPPORTED_FORMAT


def test_a_damaged_header_is_a_corrupt_image() -> None:
    assert rejection(picture(1)[:15]) is Reason.CORRUPT_IMAGE
    assert rejection(_png_header(4, 4, bit_depth=8, checksum=0)) is Reason.CORRUPT_IMAGE


def _png_header(width: int, height: int, *, bit_depth: int, checksum: int | None = None) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bit_depth, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"")
    chunks = [(header, zlib.crc32(header) if checksum is None else checksum), (body, zlib.crc32(body))]
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", crc) for chunk, crc in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
