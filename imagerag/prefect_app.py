"""The Prefect server of a home: on loopback, with a password, a check of the Host header, and a login link.

    python -m imagerag.prefect_app PORT

Prefect's settings come from the environment that `imagerag.services` sets. `prefect server start` serves the same
application without the last two. The check of the Host header prevents DNS rebinding, by which any web site could reach
127.0.0.1; the login link saves typing the password into Prefect's form.
"""

import sys

from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from imagerag.services import LOGIN_PATH

_HOSTS = ("127.0.0.1", "localhost")
_LOGIN_PAGE = """<!doctype html><title>Prefect</title><script>
localStorage.setItem("prefect-password", btoa(decodeURIComponent(location.hash.slice(1))));
location.replace("/dashboard");
</script>"""


class LoginPage:
    """ASGI middleware that serves the login page at `LOGIN_PATH` and passes on all other requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] == "http" and Request(scope).url.path == LOGIN_PATH:
            await HTMLResponse(_LOGIN_PAGE, headers={"Cache-Control": "no-store"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def main(port: int) -> None:
    """Serve on loopback until the process ends."""
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # Wraps Prefect's application from outside: its own services call it in memory, under another host name.
    app = TrustedHostMiddleware(LoginPage(create_app(final=True)), allowed_hosts=list(_HOSTS))
    server = get_current_settings().server
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        timeout_keep_alive=server.api.keepalive_timeout,
        log_level=server.logging_level.lower(),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
