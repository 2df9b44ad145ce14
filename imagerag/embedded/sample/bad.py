"""Answers of a web site that are no usable images: a fixed set of URLs, each with its expected outcome."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from threading import Event

from PIL import Image

Answer = Callable[[BaseHTTPRequestHandler, Event], None]
"""Answers one GET; the event is set when the server closes."""

_SILENCE_S = 60.0
_ENDLESS_BYTES = 2**30
_CHUNK = b"\xff" * 2**16
_BOMB_SIDE = 30_000
_ENTITY = (
    b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY secret SYSTEM "file:///etc/passwd">]>'
    b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><text y="32">&secret;</text></svg>'
)


@dataclass(frozen=True)
class BadUrl:
    """One URL of the set."""

    path: str
    caption: str
    reason: str | None
    """Expected reason of failure, a value of `imagerag.corpus.guard.Reason`; None if the download must succeed."""
    answer: Answer


def send(
    request: BaseHTTPRequestHandler, body: bytes, content_type: str, status: int = HTTPStatus.OK, **headers: str
) -> None:
    """Answer with a body; an underscore in a header's name stands for a hyphen."""
    request.send_response(status)
    request.send_header("Content-Type", content_type)
    request.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(body)


def _sends(body: Callable[[], bytes], content_type: str, status: int = HTTPStatus.OK, **headers: str) -> Answer:
    return lambda request, _: send(request, body(), content_type, status, **headers)


def _redirects(location: str) -> Answer:
    return _sends(lambda: b"", "text/plain", HTTPStatus.FOUND, Location=location)


def _drawn(image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(buffer, image_format)
    return buffer.getvalue()


def _bomb() -> bytes:
    """Return a PNG whose header claims 900 million pixels, with data of the first rows only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", _BOMB_SIDE, _BOMB_SIDE, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(100 * (_BOMB_SIDE + 1)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _stay_silent(request: BaseHTTPRequestHandler, closing: Event) -> None:
    closing.wait(_SILENCE_S)
    request.close_connection = True


def _never_end(request: BaseHTTPRequestHandler, closing: Event) -> None:
    request.send_response(HTTPStatus.OK)
    request.send_header("Content-Type", "image/jpeg")
    request.send_header("Connection", "close")
    request.end_headers()
    for _ in range(_ENDLESS_BYTES // len(_CHUNK)):
        if closing.is_set():
            return
        request.wfile.write(_CHUNK)


def _fail_once() -> Answer:
    failed = Event()

    def answer(request: BaseHTTPRequestHandler, _: Event) -> None:
        if failed.is_set():
            send(request, _drawn("PNG"), "image/png")
        else:
            failed.set()
            send(request, b"busy", "text/plain", HTTPStatus.INTERNAL_SERVER_ERROR)

    return answer


def bad_urls() -> tuple[BadUrl, ...]:
    """Return a new set, in which the URL that fails once has not failed yet."""
    png, html = _drawn("PNG"), b"<!doctype html><title>Not found</title>"
    half_jpeg = _drawn("JPEG")[:700]
    noai = _sends(lambda: png, "image/png", X_Robots_Tag="noai")
    tdm = _sends(lambda: png, "image/png", tdm_reservation="1")
    svg = _sends(lambda: _ENTITY, "image/svg+xml")
    page = _sends(lambda: html, "text/html")
    image = _sends(lambda: png, "image/png")
    loop = ("/bad/loop-a.png", "/bad/loop-b.png")
    return (
        BadUrl("/bad/missing.png", "an image that is gone", "http_status", _sends(lambda: html, "text/html", 404)),
        BadUrl("/bad/busy-once.png", "an image that comes at the second try", None, _fail_once()),
        BadUrl("/bad/silent.png", "an image that never comes", "timeout", _stay_silent),
        BadUrl("/bad/truncated.jpg", "half an image", "corrupt_image", _sends(lambda: half_jpeg, "image/jpeg")),
        BadUrl("/bad/page.png", "a page named like an image", "unsupported_format", page),
        BadUrl("/bad/bomb.png", "a decompression bomb", "too_many_pixels", _sends(_bomb, "image/png")),
        BadUrl("/bad/endless.jpg", "an image without an end", "too_many_bytes", _never_end),
        BadUrl(loop[0], "an image that is always elsewhere", "redirect_loop", _redirects(loop[1])),
        BadUrl(loop[1], "an image that is always elsewhere, too", "redirect_loop", _redirects(loop[0])),
        BadUrl("/bad/to-file.png", "a redirect to a local file", "blocked_scheme", _redirects("file:///etc/passwd")),
        BadUrl(
            "/bad/to-private.png",
            "a redirect to a private network",
            "blocked_address",
            _redirects("http://10.255.255.1/x.png"),
        ),
        BadUrl(
            "/bad/to-metadata.png",
            "a redirect to a cloud's metadata",
            "blocked_address",
            _redirects("http://169.254.169.254/latest/meta-data/"),
        ),
        BadUrl("/bad/noai.png", "an image that opts out", "opt_out", noai),
        BadUrl("/bad/tdm.png", "an image that reserves mining", "opt_out", tdm),
        BadUrl("/bad/entity.svg", "a drawing that reads files", "unsupported_format", svg),
        BadUrl("/bad/twin-a.png", "one image under two URLs", None, image),
        BadUrl("/bad/twin-b.png", "one image under two URLs", None, image),
    )
