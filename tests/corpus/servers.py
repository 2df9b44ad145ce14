"""What servers are like, and what has to come of what each answers: one row a case."""

import time
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler

from tests.corpus.fetched import Fetched
from tests.corpus.photos import encoded, scene
from tests.corpus.web import Web


def _served(status: int, body: bytes = b"", **headers: str) -> Callable[[Web, str], str]:
    return lambda web, path: web.serve(path, body, status, **headers)


def _redirected(status: int) -> Callable[[Web, str], str]:
    def serve(web: Web, path: str) -> str:
        target = web.serve(f"{path}-target", encoded(scene((60, 90))))
        return web.serve(path, b"", status, Location=target)

    return serve


def _at_first(*answers: tuple[int, dict[str, str]]) -> Callable[[Web, str], str]:
    """A site of its own that answers like this before it serves a picture."""
    return lambda web, path: web.apart().serve_first(path, answers, encoded(scene((60, 90))))


def _always(status: int, **headers: str) -> Callable[[Web, str], str]:
    return lambda web, path: web.apart().serve(path, b"", status, **headers)


def _hangs_up_once(web: Web, path: str) -> str:
    site = web.apart()
    url = site.serve(path, encoded(scene((60, 90))))
    serve = site.pages[path]
    site.pages[path] = lambda handler: None if site.requests[path] == 1 else serve(handler)
    return url


def _asks_for_its_cookie(web: Web, path: str) -> str:
    """Sends whoever has no cookie to the place where it is set, and back."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        (serve if handler.headers["Cookie"] == "seen=1" else redirect)(handler)

    web.serve(path, encoded(scene((60, 90))))
    serve = web.pages[path]
    web.redirect(path, f"{path}-set")
    redirect = web.pages[path]
    web.serve(f"{path}-set", b"", 302, Location=path, Set_Cookie="seen=1; Path=/")
    web.pages[path] = answer
    return web.url(path)


def _refuses_cookies(web: Web, path: str) -> str:
    """What another chain set must not come with a later request."""
    web.serve(path, encoded(scene((60, 90))))
    serve = web.pages[path]
    web.pages[path] = lambda handler: handler.send_error(400) if handler.headers["Cookie"] else serve(handler)
    web.serve(f"{path}-away", b"", 302, Location="http://localhost:1/", Set_Cookie="seen=1; Path=/")
    return web.url(path)


def _in(seconds: float) -> str:
    return formatdate(time.time() + seconds, usegmt=True)


def _hosts() -> list[Fetched]:
    """Servers that are in trouble, or say that we are too fast."""
    passing = [
        Fetched(what=f"{what} at first", serve=_at_first((status, headers)), size=(60, 90))
        for what, status, headers in (
            ("429 with Retry-After: 1", 429, {"Retry-After": "1"}),
            ("429 with a date that is over", 429, {"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}),
            ("429 without Retry-After", 429, {}),
            ("429 with a senseless Retry-After", 429, {"Retry-After": "soon"}),
            ("503 with Retry-After: 0", 503, {"Retry-After": "0"}),
            ("503", 503, {}),
            ("500", 500, {}),
            ("502", 502, {}),
            ("504", 504, {}),
            ("408", 408, {}),
        )
    ]  # fmt: skip
    lasting = [
        Fetched(what=f"status {status}, always", serve=_always(status), outcome=outcome, detail=str(status))
        for status, outcome in ((429, "server_busy"), (503, "server_busy"), (500, "server_error"))
    ]
    away = [
        Fetched(what=f"429 for an hour, {what}", serve=_always(429, Retry_After=wait), outcome="host_down")
        for what, wait in (("in seconds", "3600"), ("as a date", _in(3600)))
    ]
    return [
        *passing,
        *lasting,
        *away,
        Fetched(what="404 is not tried again", serve=_at_first((404, {})), outcome="http_status", detail="404"),
        Fetched(what="429 with a date", serve=lambda web, path: _at_first((429, {"Retry-After": _in(1)}))(web, path)),
        Fetched(what="a connection that is closed at first", serve=_hangs_up_once, size=(60, 90)),
        Fetched(what="nobody there", serve=lambda web, path: "http://127.0.0.1:1/x", outcome="connection_failed"),
        Fetched(
            what="TLS where there is none",
            serve=lambda web, path: web.apart().url(path).replace("http", "https"),
            outcome="connection_failed",
        ),
        Fetched(
            what="a host that there isn't",
            serve=lambda web, path: "http://no-such-host.invalid/x",
            outcome="dns_failure",
        ),
    ]


def _written(host: str, outcome: str = "success") -> Fetched:
    """A way of writing a host: `{}` stands for the port."""

    def serve(web: Web, path: str) -> str:
        web.serve(path, encoded(scene((60, 90))))
        return f"http://{host.format(web.port)}{path}"

    return Fetched(what=f"a host written {host}", serve=serve, outcome=outcome)


def _servers() -> list[Fetched]:
    photo = encoded(scene((60, 90)))
    gone = [
        Fetched(what=f"status {status}", serve=_served(status, b"no"), outcome="http_status", detail=str(status))
        for status in (304, 400, 401, 403, 404, 410, 418, 451, 501)
    ]
    redirects = [
        Fetched(what=f"a redirect, {status}", serve=_redirected(status), size=(60, 90))
        for status in (301, 302, 303, 307, 308)
    ]
    opt_outs = {
        "noai": {"X_Robots_Tag": "noai"},
        "noimageai among others": {"X_Robots_Tag": "nofollow, noimageai"},
        "noindex for this program": {"X_Robots_Tag": "imageragturbo: noindex"},
        "tdm-reservation": {"tdm_reservation": "1"},
    }
    refused = [
        Fetched(what=f"opt-out: {what}", serve=_served(200, photo, **headers), outcome="opt_out")
        for what, headers in opt_outs.items()
    ]
    hosts = [
        _written("127。0。0。1:{}"),
        _written("\N{FULLWIDTH DIGIT ONE}27.0.0.1:{}"),
        _written("127.0.0%2E1:{}"),
        _written("10。255。255。1:{}", "blocked_address"),
        _written("a%2Fb.example:{}", "invalid_url"),
        _written("%FF.example:{}", "invalid_url"),
        _written("[::1]:{}", "blocked_address"),
    ]
    return [
        *_hosts(),
        *hosts,
        Fetched(what="a redirect that sets a cookie", serve=_asks_for_its_cookie, size=(60, 90)),
        Fetched(what="a cookie is of its redirects alone", serve=_refuses_cookies, size=(60, 90)),
        *gone,
        *redirects,
        *refused,
        Fetched(
            what="noai for another program", serve=_served(200, photo, X_Robots_Tag="otherbot: noai"), size=(60, 90)
        ),
        Fetched(what="tdm-reservation: 0", serve=_served(200, photo, tdm_reservation="0"), size=(60, 90)),
        Fetched(what="a wrong content type", serve=_served(200, photo, Content_Type="text/html"), size=(60, 90)),
        Fetched(
            what="a redirect to a file",
            serve=lambda web, path: web.redirect(path, "file:///etc/passwd"),
            outcome="blocked_scheme",
        ),
        Fetched(
            what="a redirect to a private network",
            serve=lambda web, path: web.redirect(path, "http://10.255.255.1/x.png"),
            outcome="blocked_address",
        ),
        Fetched(what="a redirect to itself", serve=lambda web, path: web.redirect(path, path), outcome="redirect_loop"),
        Fetched(
            what="fewer bytes than announced",
            serve=_served(200, photo, Content_Length=str(len(photo) + 9)),
            outcome="connection_failed",
        ),
        Fetched(
            what="more bytes announced than may come",
            serve=_served(200, photo, Content_Length=str(10**12)),
            outcome="too_many_bytes",
        ),
        Fetched(
            what="bytes that drip",
            serve=lambda web, path: web.serve_slowly(path, b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.2),
            outcome="timeout",
        ),
        Fetched(
            what="bytes without an end",
            serve=lambda web, path: web.serve_slowly(path, b"HTTP/1.1 200 OK\r\n\r\n", bytes(50_000), 0.001),
            outcome="too_many_bytes",
        ),
        Fetched(
            what="no HTTP",
            serve=lambda web, path: web.serve_slowly(path, b"SSH-2.0\r\n", b"\r\n", 0.2),
            outcome="connection_failed",
        ),
        Fetched(what="a host's own machine", serve=lambda web, path: "http://localhost:1/x", outcome="blocked_address"),
        Fetched(what="a file", serve=lambda web, path: "file:///etc/passwd", outcome="blocked_scheme"),
        Fetched(what="no URL", serve=lambda web, path: "nonsense", outcome="invalid_url"),
        Fetched(what="a port that isn't one", serve=lambda web, path: "http://a.example:x/", outcome="invalid_url"),
        Fetched(
            what="a name in the URL", serve=lambda web, path: f"http://me:pw@{web.host}{path}", outcome="invalid_url"
        ),
        Fetched(
            what="a path in another script",
            serve=lambda web, path: web.serve(f"{path}/%E9%BE%99.jpg", photo).replace("%E9%BE%99", "龙"),
            size=(60, 90),
        ),
        Fetched(
            what="a space in the path",
            serve=lambda web, path: web.serve(f"{path}/my%20photo.jpg", photo).replace("%20", " "),
            size=(60, 90),
        ),
    ]


SERVERS = _servers()
