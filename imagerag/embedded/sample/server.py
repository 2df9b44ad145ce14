"""The sample corpus as a web site on loopback: its drawings, and a fixed set of bad URLs."""

import errno
import hashlib
import random
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Self

from imagerag.embedded.sample import Concept, Drawing, load_concepts, load_drawings
from imagerag.embedded.sample.bad import bad_urls, send
from imagerag.errors import UserError
from imagerag.storage.files import write_file

if TYPE_CHECKING:
    import pyarrow as pa

HOST = "127.0.0.1"
_ORDER_SEED = 2602_12640
LATER_STYLE = "emojione"
_LATER_EVERY = 8

BAD_URLS = bad_urls()
"""The bad URLs, with the expected outcome of each. Every server uses a new set, with its own state."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors: the bad URLs make clients hang up."""


class SampleServer:
    """A web server that runs while the block runs."""

    def __init__(self, port: int = 0) -> None:
        """Bind a port of the loopback address, by default any free one.

        Raises:
            UserError: if the port is in use.
        """
        self._closing = Event()
        self._bad = {bad.path: bad for bad in bad_urls()}
        self._drawings = {_path(drawing): drawing for drawing in load_drawings()}
        try:
            self._server = _Server((HOST, port), self._handler())
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UserError(
                f"the sample corpus needs port {port} of {HOST}, which another process listens on"
            ) from error
        self.url = f"http://{HOST}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def url_list(self, limit: int | None = None, *, later: bool = True) -> "pa.Table":
        """Return url, caption, source and licence of all drawings and bad URLs, always in the same mixed order.

        Args:
            limit: number of drawings; a smaller list is a subset of every larger one. All bad URLs are included.
            later: whether to include what is added to a corpus later: one style, and `later_concepts`.
        """
        import pyarrow as pa

        order = random.Random(_ORDER_SEED)  # noqa: S311 (an order, not a secret)
        drawings = order.sample(list(self._drawings.items()), len(self._drawings))[:limit]
        if not later:
            new = {concept.codepoint for concept in later_concepts()}
            drawings = [
                (path, each) for path, each in drawings
                if each.style.name != LATER_STYLE and each.concept.codepoint not in new
            ]  # fmt: skip
        rows: list[dict[str, str | None]] = [
            {"url": self.url + path, "caption": d.concept.name, "source": d.style.title, "licence": d.style.licence}
            for path, d in drawings
        ]
        rows += [
            {"url": self.url + bad.path, "caption": bad.caption, "source": "bad URLs", "licence": None}
            for bad in self._bad.values()
        ]
        order.shuffle(rows)
        return pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in rows[0]]))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                drawing, bad = site._drawings.get(self.path), site._bad.get(self.path)
                if drawing is not None:
                    etag = f'"{hashlib.sha256(drawing.image).hexdigest()[:16]}"'
                    send(self, drawing.image, "image/webp", ETag=etag, Cache_Control="max-age=86400")
                elif bad is not None:
                    bad.answer(self, site._closing)
                else:
                    send(self, b"no such drawing", "text/plain", HTTPStatus.NOT_FOUND)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing, because thousands of requests are normal."""

        return Handler


def _path(drawing: Drawing) -> str:
    return f"/{drawing.style.name}/{drawing.concept.codepoint}.webp"


def remembered_port(home: Path) -> int:
    """Return the port of this home's sample corpus: a free one at first, and from then on the same.

    So the URLs stay the same, and earlier downloads are recognised.

    Raises:
        UserError: if another process is listening on it.
    """
    record = home / "sample" / "port"
    if not record.exists():
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            write_file(str(record), str(probe.getsockname()[1]).encode())
    port = int(record.read_text())
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"the sample corpus of this home is served on port {port} of {HOST}, which another process listens on: "
                f"stop it (a second `imagerag sample serve`?), or delete {record} to move to another port"
            ) from error
    return port


def later_concepts() -> tuple[Concept, ...]:
    """Return some held-out concepts, which can be added to the sample corpus later."""
    return tuple(concept for concept in load_concepts() if concept.split == "held_out")[::_LATER_EVERY]


def write_url_list(server: SampleServer, home: Path, limit: int | None = None, *, later: bool = True) -> Path:
    """Write the server's list to the home's `sample/urls.parquet`, replacing it atomically; return the path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = home / "sample" / "urls.parquet"
    sink = pa.BufferOutputStream()
    pq.write_table(server.url_list(limit, later=later), sink)
    write_file(str(path), sink.getvalue().to_pybytes())
    return path


def write_held_out(home: Path) -> Path:
    """Write the names of the held-out concepts to the home's `sample/held_out.txt`; return the path."""
    path = home / "sample" / "held_out.txt"
    names = [concept.name for concept in load_concepts() if concept.split == "held_out"]
    write_file(str(path), "".join(f"{name}\n" for name in names).encode())
    return path


def write_prompts(home: Path) -> Path:
    """Write held-out names and groups, except `later_concepts`, to the home's `sample/prompts.txt`; return the path."""
    path = home / "sample" / "prompts.txt"
    later = later_concepts()
    concepts = [each for each in load_concepts() if each.split == "held_out" and each not in later]
    write_file(str(path), "".join(f"{each.name}\t{each.group}\n" for each in concepts).encode())
    return path
