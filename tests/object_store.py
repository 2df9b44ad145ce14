"""An S3 server in this process, behind a proxy that fails as stores and the way to them do."""

import http.client
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, get_args

import fsspec
import pytest

BUCKET = "imagerag"
SLOW_S = 0.3
_HOP = {"connection", "content-length", "server", "transfer-encoding"}

Fault = Literal["refused", "carried out, then 500", "carried out, then cut", "cut at the last byte", "slow"]
"""What becomes of a request: the store does nothing and says so; it does what it is asked, and says that it failed, or
nothing; its answer lacks the last byte; it takes `SLOW_S`."""
FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass
class ObjectStore:
    """Where it is, and what goes wrong with it next."""

    url: str
    environment: dict[str, str]
    """Of its users."""
    _faults: deque[tuple[str, str, Fault]] = field(default_factory=deque)

    def fail(self, method: str, part: str, *faults: Fault) -> None:
        """Have these befall the next requests by a method for a path with a part in it, one after the other."""
        self._faults.extend((method, part, fault) for fault in faults)

    def next_fault(self, method: str, path: str) -> Fault | None:
        for each in list(self._faults):
            if each[0] == method and each[1] in path:
                self._faults.remove(each)
                return each[2]
        return None

    @property
    def spared(self) -> bool:
        """Whether a fault has not happened yet."""
        return bool(self._faults)


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Start one with an empty bucket, and have this process and those that it starts use it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    _, port = moto.get_host_and_port()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    proxy.daemon_threads = True
    url = f"http://127.0.0.1:{proxy.server_port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    _Proxy.port, _Proxy.store = port, ObjectStore(url, environment)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            # fsspec keeps an instance by its arguments: one made for another store's address would answer here.
            fsspec.filesystem("s3").clear_instance_cache()
            yield _Proxy.store
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        proxy.shutdown()
        moto.stop()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    port: int
    store: ObjectStore
    lock = threading.Lock()

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.store.next_fault(self.command, self.path)
        if fault == "refused":
            self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        with self.lock:  # moto looks at conditions and writes in two steps
            status, headers, content = self._pass_on(body)
        if fault == "slow":
            time.sleep(SLOW_S)
        if fault == "carried out, then 500":
            self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
        elif fault == "carried out, then cut":
            self.close_connection = True
        else:
            self._answer(status, headers, content, is_cut=fault == "cut at the last byte")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

    def _pass_on(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, dict(response.getheaders()), content

    def _answer(self, status: int, headers: Mapping[str, str], content: bytes, *, is_cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        # Of an answer without content, the end of its headers is what gets lost.
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        if is_cut and not content:
            self.close_connection = True
            return
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:-1] if is_cut else content)
        self.close_connection = self.close_connection or is_cut

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
