"""The network part of the guard: a `urllib` opener that connects only to public addresses.

It supports http and https only, checks every address before connecting, connects to exactly the checked address, and
does the same for every redirect.
"""

import io
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from email.utils import formatdate, parsedate_to_datetime
from functools import cached_property, partial
from http import client
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from http.cookiejar import CookieJar
from string import punctuation
from typing import IO, Any
from urllib import request as urllib_request
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import AbstractHTTPHandler, HTTPRedirectHandler, OpenerDirector, Request

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.guard import BUSY_STATUSES, SERVER_ERROR_STATUSES, FetchError, Reason, is_public
from imagerag.corpus.names import Names, ascii_host

_PIECE = 64 * 1024  # bytes read at a time, so that memory use never depends on the length that a server claims
_WEB_PORTS = (80, 443)


class NotModifiedError(Exception):
    """The image has not changed since the version that the request's validators describe (status 304)."""

    def __init__(self, headers: Message) -> None:
        super().__init__("304")
        self.headers = headers


def guarded_opener(config: DownloadConfig, names: Names | None = None) -> OpenerDirector:
    """Return an opener that is safe for untrusted URLs.

    It raises `FetchError`, and `NotModifiedError` for conditional requests. The `timeout` of a call is required and
    limits the whole call: name lookup, connecting, redirects, headers and body together. Proxies from the environment
    are not used, because a proxy looks up names itself, where they can't be checked. Cookies are kept from the
    redirect that sets them to the end of the chain of redirects.

    A response has `length`, the remaining size of the body in bytes if known; `deadline`, its time limit on the
    monotonic clock, which may be changed; and `read`, which returns the whole body.
    """
    opener = _Opener()
    opener.add_handler(_GuardedHandler(config, names or Names()))
    opener.add_handler(_Redirects())
    opener.add_handler(urllib_request.HTTPErrorProcessor())
    opener.add_handler(urllib_request.HTTPDefaultErrorHandler())
    return opener


class _Opener(OpenerDirector):
    def open(self, *args: Any, **kwargs: Any) -> Any:
        with _named_errors():
            return super().open(*args, **kwargs)


class _GuardedHandler(AbstractHTTPHandler):
    def __init__(self, config: DownloadConfig, names: Names) -> None:
        super().__init__()
        self._config = config
        self._allowed_hosts = frozenset(ascii_host(host.lower()) for host in config.allowed_hosts)
        self._names = names

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def http_request(self, request: Request) -> Request:
        if "@" in (request.host or ""):
            raise FetchError(Reason.INVALID_URL, "user name or password in the URL")
        request.full_url = _as_browsers_do(request.full_url)
        request.add_header("User-Agent", self._config.user_agent)
        if not hasattr(request, "deadline"):
            assert request.timeout is not None
            _set_deadline(request, time.monotonic() + request.timeout)
        return self.do_request_(request)

    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(partial(_Connection, **self._guards(request)), request)

    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(partial(_SecureConnection, context=self._tls, **self._guards(request)), request)

    def unknown_open(self, request: Request) -> None:
        raise FetchError(Reason.BLOCKED_SCHEME, repr(request.type))

    def http_response(self, request: Request, response: HTTPResponse) -> HTTPResponse:
        if self._config.respect_opt_out and response.headers.get("tdm-reservation", "").strip() == "1":
            response.close()
            raise FetchError(Reason.OPT_OUT, "tdm-reservation: 1")
        return response

    https_request = http_request
    https_response = http_response

    def _guards(self, request: Request) -> dict[str, Any]:
        return {
            "allowed_hosts": self._allowed_hosts,
            "names": self._names,
            "max_bytes": self._config.max_bytes,
            "deadline": _deadline_of(request),
        }


class _Redirects(HTTPRedirectHandler):
    max_redirections = 5

    def http_error_302(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: client.HTTPMessage) -> Any:
        scheme = urlsplit(urljoin(req.full_url, headers.get("location", ""))).scheme
        if scheme not in ("http", "https"):
            raise FetchError(Reason.BLOCKED_SCHEME, f"redirect to {scheme!r}")
        if "Set-Cookie" in headers:
            _cookies_of(req).extract_cookies(fp, req)  # type: ignore[arg-type]  # it uses only the headers
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req: Request, *args: Any) -> Request | None:
        request = super().redirect_request(req, *args)
        if request is not None:
            _set_deadline(request, _deadline_of(req))
            if hasattr(req, "cookies"):
                request.full_url = _as_browsers_do(request.full_url)
                request.cookies = _cookies_of(req)  # type: ignore[attr-defined]
                _cookies_of(req).add_cookie_header(request)
        return request


class _Connection(HTTPConnection):
    """A connection to the address that was checked, and to no other."""

    def __init__(
        self,
        *args: Any,
        allowed_hosts: frozenset[str],
        names: Names,
        max_bytes: int,
        deadline: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._allowed_hosts = allowed_hosts
        self._names = names
        self._deadline = deadline
        self._create_connection = self._dial  # called by `connect`, with and without TLS
        self.response_class = partial(_Response, max_bytes=max_bytes, deadline=deadline)  # type: ignore[assignment]

    def _dial(self, destination: tuple[str, int], *_: Any) -> socket.socket:
        host, port = destination
        if not 0 < port < 2**16:
            raise FetchError(Reason.INVALID_URL, f"port {port}")
        # Looked up only once, so that the checked address is the one connected to, even if the DNS answer changes.
        endpoints = self._names.look_up(host, port, _left(self._deadline))
        if self._allowed_hosts.isdisjoint({host.lower(), f"{host.lower()}:{port}"}):
            _check_public(host, port, [str(address[0]) for *_, address in endpoints])
        failure: OSError = socket.gaierror(f"{host} has no address")
        for family, kind, protocol, _, address in endpoints:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(_left(self._deadline))
                sock.connect(address)
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure


class _SecureConnection(_Connection, HTTPSConnection):
    """A `_Connection` over TLS; the certificate is verified against the host name."""

    def _dial(self, destination: tuple[str, int], *_: Any) -> socket.socket:
        sock = super()._dial(destination)
        sock.settimeout(_left(self._deadline))  # for the handshake
        return sock


class _Response(HTTPResponse):
    """A response with a size limit and a deadline."""

    def __init__(self, sock: socket.socket, *args: Any, max_bytes: int, deadline: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._max_bytes = max_bytes
        self._timed = _TimedReader(self.fp.detach(), sock, deadline)
        self.fp = io.BufferedReader(self._timed)

    @property
    def deadline(self) -> float:
        """Time limit of the response, on the monotonic clock."""
        return self._timed.deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        self._timed.deadline = deadline

    def read(self, amt: int | None = None) -> bytes:
        """Return the whole body; `amt` is ignored."""
        body = io.BytesIO()
        with _named_errors():
            if self.length is not None and self.length > self._max_bytes:
                self.close()
                raise _too_many(self._max_bytes)
            while piece := super().read(_PIECE):
                body.write(piece)
                if body.tell() > self._max_bytes:
                    self.close()
                    raise _too_many(self._max_bytes)
            if self.length:
                raise client.IncompleteRead(body.getvalue(), self.length)
        return body.getvalue()


class _TimedReader(io.RawIOBase):
    """A socket reader with a deadline; a socket's own timeout restarts with every packet."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self._raw, self._sock, self.deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self.deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _check_public(host: str, port: int, addresses: list[str]) -> None:
    if port < 1024 and port not in _WEB_PORTS:
        raise FetchError(Reason.BLOCKED_ADDRESS, f"port {port} is not one of a web server")
    for address in addresses:
        if not is_public(address):
            raise FetchError(Reason.BLOCKED_ADDRESS, f"{host} is at {address}, which is not public")


def _too_many(max_bytes: int) -> FetchError:
    return FetchError(Reason.TOO_MANY_BYTES, f"more than {max_bytes} bytes")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _set_deadline(request: Request, deadline: float) -> None:
    request.deadline = deadline  # type: ignore[attr-defined]  # urllib stores its state of redirects there, too


def _deadline_of(request: Request) -> float:
    return float(request.deadline)  # type: ignore[attr-defined]


def _cookies_of(request: Request) -> CookieJar:
    if not hasattr(request, "cookies"):
        request.cookies = CookieJar()  # type: ignore[attr-defined]
    return request.cookies  # type: ignore[attr-defined, no-any-return]


def _as_browsers_do(url: str) -> str:
    """Return the URL in ASCII: the host IDNA-encoded, the rest percent-encoded."""
    if url.isascii() and " " not in url and "%" not in urlsplit(url).netloc:
        return url
    parts = urlsplit(url)
    host, colon, port = parts.netloc.partition(":")  # an IPv6 address has more colons, but is ASCII
    return quote(parts._replace(netloc=f"{ascii_host(host)}{colon}{port}").geturl(), safe=punctuation)


def _wait_s(headers: Message) -> float | None:
    """Return the seconds that `Retry-After` asks to wait, if any; a date is relative to the server's own clock."""
    asked = headers.get("Retry-After", "").strip()
    if asked.isascii() and asked.isdigit():
        return float(asked[:9])
    try:
        until, now = parsedate_to_datetime(asked), parsedate_to_datetime(headers.get("Date") or formatdate(usegmt=True))
        return max(0.0, until.timestamp() - now.timestamp())
    except (ValueError, OverflowError):
        return None


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, client.HTTPException, ValueError) as error:
        named = _named(error)
        if isinstance(error, HTTPError):
            error.close()
        raise named from error


def _named(error: Exception) -> Exception:
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    match error:
        case HTTPError() if error.msg.startswith(HTTPRedirectHandler.inf_msg):
            return FetchError(Reason.REDIRECT_LOOP, f"a circle, or more than {_Redirects.max_redirections} redirects")
        case HTTPError(code=304):
            return NotModifiedError(error.headers)
        case HTTPError() if error.code in BUSY_STATUSES:
            return FetchError(Reason.SERVER_BUSY, str(error.code), _wait_s(error.headers))
        case HTTPError() if error.code in SERVER_ERROR_STATUSES:
            return FetchError(Reason.SERVER_ERROR, str(error.code))
        case HTTPError():
            return FetchError(Reason.HTTP_STATUS, str(error.code))
        case TimeoutError():
            return FetchError(Reason.TIMEOUT, str(error))
        case socket.gaierror():
            return FetchError(Reason.DNS_FAILURE, str(error))
        case ssl.SSLError():
            return FetchError(Reason.CONNECTION_FAILED, str(error))
        case ValueError() | URLError() | client.InvalidURL():
            return FetchError(Reason.INVALID_URL, str(error))
        case _:
            return FetchError(Reason.CONNECTION_FAILED, f"{type(error).__name__}: {error}")
