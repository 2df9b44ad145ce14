"""Images to measure with: the sample corpus' drawings as files, behind a web server in a process of its own."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imagerag.compute import start_ray
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.download import download
from imagerag.corpus.url_list import read_url_list
from imagerag.embedded.sample import load_drawings
from imagerag.settings import Settings

HOST = "127.0.0.1"


def write_drawings(folder: Path) -> list[tuple[str, str]]:
    """Write every drawing as a file; return file names and captions."""
    folder.mkdir()
    named = []
    for drawing in load_drawings():
        name = f"{drawing.style.name}-{drawing.concept.codepoint}.webp"
        (folder / name).write_bytes(drawing.image)
        named.append((name, f"{drawing.concept.name}, {drawing.style.title}"))
    return named


def write_url_list(path: Path, base_url: str, files: list[tuple[str, str]], copies: range) -> None:
    """Write a parquet list of URLs and captions, no pair twice: copy `n` of a file differs in query and caption."""
    numbered = [(*files[copy % len(files)], copy // len(files)) for copy in copies]
    urls = [f"{base_url}/{name}?copy={number}" for name, _, number in numbered]
    captions = [f"{caption}, copy {number}" for _, caption, number in numbered]
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)


@contextmanager
def serving(folder: Path, rate: int | None = None) -> Iterator[str]:
    """Serve a folder's files over HTTP on loopback, from another process; yields the address.

    With a `rate`, only so many requests in any second are answered, the others by 429 and `Retry-After`.
    """
    context = get_context("spawn")
    port, child_end = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(folder, rate, child_end), daemon=True)
    process.start()
    try:
        yield f"http://{HOST}:{port.recv()}"
    finally:
        process.kill()
        process.join()


def make_shards(url_lists: list[Path], home: Path, config: DownloadConfig) -> list[str]:
    """Download lists, each to shards of its own under the list's name; return the URIs."""
    settings = Settings(home=home)
    uris = [settings.shards_of(url_list.stem) for url_list in url_lists]
    start_ray(settings)
    for url_list, uri in zip(url_lists, uris, strict=True):
        result = download(read_url_list(str(url_list)), corpus=Corpus(uri), config=config, settings=settings)
        assert result.num_failed == 0, f"the bench's own server failed: {result.reasons}"
    return uris


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024  # the default of 5 makes clients wait a second for a second try


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class _LimitedHandler(_Handler):
    def __init__(self, *args: Any, rate: int, answered: deque[float], lock: threading.Lock, **options: Any) -> None:
        self._rate, self._answered, self._lock = rate, answered, lock
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        now = time.monotonic()
        with self._lock:
            while self._answered and self._answered[0] <= now - 1:
                self._answered.popleft()
            wait_s = self._answered[0] + 1 - now if len(self._answered) >= self._rate else 0
            if not wait_s:
                self._answered.append(now)
        if not wait_s:
            super().do_GET()
            return
        self.send_response(HTTPStatus.TOO_MANY_REQUESTS)
        self.send_header("Retry-After", str(math.ceil(wait_s)))
        self.send_header("Content-Length", "0")
        self.end_headers()


def _serve(folder: Path, rate: int | None, port: Connection) -> None:
    handler: Callable[..., BaseHTTPRequestHandler] = partial(_Handler, directory=str(folder))
    if rate is not None:
        limits = {"rate": rate, "answered": deque(), "lock": threading.Lock()}
        handler = partial(_LimitedHandler, directory=str(folder), **limits)
    with _Server((HOST, 0), handler) as server:
        port.send(server.server_port)
        server.serve_forever()
