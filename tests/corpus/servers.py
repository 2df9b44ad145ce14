"""What servers are like, and what has to come of what each answers: one row a case."""

from collections.abc import Callable

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


def _servers() -> list[Fetched]:
    photo = encoded(scene((60, 90)))
    gone = [
        Fetched(what=f"status {status}", serve=_served(status, b"no"), outcome="http_status", detail=str(status))
        for status in (400, 401, 403, 404, 410, 418, 451, 500, 503)
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
    return [
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
