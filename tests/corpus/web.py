"""A small web site for tests: every path is answered by a function."""

import io
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

from PIL import Image


class Web:
    """Serves on loopback while the block runs; `requests` counts them by path."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.requests: Counter[str] = Counter()
        self.user_agents: set[str] = set()
        self.closing = Event()
        self._others = ExitStack()
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web.requests[self.path] += 1
                web.user_agents.add(self.headers["User-Agent"])
                self.close_connection = True
                web.pages[self.path](self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                pass  # clients that hang up are what is tested

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.host = f"127.0.0.1:{self.port}"

    def __enter__(self) -> "Web":
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._others.close()
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def apart(self) -> "Web":
        """Another site, at another port, for as long as this one: what it does to its host hurts no other."""
        return self._others.enter_context(Web())

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def serve(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        """Answer `path` with `body`; an underscore in a header's name stands for a hyphen. Returns the URL."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in ({"Content_Length": str(len(body))} | headers).items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(body)

        self.pages[path] = answer
        return self.url(path)

    def serve_first(self, path: str, answers: Sequence[tuple[int, dict[str, str]]], body: bytes) -> str:
        """Answer `path` by these statuses and headers, one a request, and by `body` from then on."""
        coming = iter(answers)

        def answer(handler: BaseHTTPRequestHandler) -> None:
            status, headers = next(coming, (200, {}))
            handler.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)

        self.pages[path] = answer
        return self.url(path)

    def redirect(self, path: str, target: str) -> str:
        return self.serve(path, b"", status=302, Location=target)

    def serve_slowly(self, path: str, start: bytes, piece: bytes, pause_s: float) -> str:
        """Answer with `start` and then `piece` for ever."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.wfile.write(start)
            while not self.closing.wait(pause_s):
                handler.wfile.write(piece)

        self.pages[path] = answer
        return self.url(path)


def picture(seed: int, size: tuple[int, int] = (24, 16), image_format: str = "JPEG") -> bytes:
    """A one-coloured image file that no other seed has."""
    file = io.BytesIO()
    Image.new("RGB", size, (seed % 256, seed // 256 % 256, 99)).save(file, image_format)
    return file.getvalue()
