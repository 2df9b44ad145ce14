"""Host names: normalised as browsers do, and looked up with a timeout."""

import platform
import re
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote

import idna

from imagerag.errors import UserError

_FRESH_S = 60.0  # seconds for which an answer is cached
_NUM_ASKED = 10
_ALWAYS_THERE = "a.root-servers.net"
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f#%/:<>?@\[\\\]^|]")  # characters that the URL standard forbids in a host

Resolve = Callable[..., list[Any]]
"""The type of `socket.getaddrinfo`, which tests replace."""


class Names:
    """A cache of host addresses, shared by threads; successful answers are kept for a minute."""

    def __init__(self, resolve: Resolve = socket.getaddrinfo) -> None:
        self._resolve = resolve
        self._asked: dict[tuple[str, int], tuple[float, Future[list[Any]]]] = {}
        self._lock = Lock()

    def look_up(self, host: str, port: int, timeout_s: float) -> list[Any]:
        """Return the answer of `socket.getaddrinfo`.

        Raises:
            socket.gaierror: if the lookup fails, or takes longer than `timeout_s`.
        """
        now = time.monotonic()
        with self._lock:
            asked_at, answer = self._asked.get((host, port), (now, None))
            is_old = answer is not None and answer.done() and (answer.exception() or now > asked_at + _FRESH_S)
            if answer is None or is_old:
                answer = Future()
                self._asked[host, port] = now, answer
                # A lookup can't be cancelled. In a daemon thread, it blocks neither other lookups nor process exit.
                Thread(target=self._ask, args=(answer, host, port), daemon=True).start()
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, f"no answer within {timeout_s:.1f} s") from None

    def _ask(self, answer: Future[list[Any]], host: str, port: int) -> None:
        try:
            answer.set_result(self._resolve(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # noqa: BLE001 - raised in the threads that wait for the answer
            answer.set_exception(error)

    def require(self, hosts: Iterable[str], timeout_s: float) -> None:
        """Check that this machine can look up names: one of the first hosts, or else one that always exists.

        Raises:
            UserError: if all these lookups fail.
        """
        some = list(dict.fromkeys(hosts))[:_NUM_ASKED]
        if not some:
            return
        with ThreadPoolExecutor(len(some)) as pool:
            is_found = any(list(pool.map(lambda host: self._is_found(host, timeout_s), some)))
        if not is_found and not self._is_found(_ALWAYS_THERE, timeout_s):
            raise UserError(
                f"{platform.node()} can look up no names ({', '.join(some[:3])}, ...): it has no network or no DNS. "
                "What was fetched is kept, and the next run goes on from there"
            )

    def _is_found(self, host: str, timeout_s: float) -> bool:
        try:
            return bool(self.look_up(host, 80, timeout_s))
        except (OSError, ValueError):
            return False


def ascii_host(host: str) -> str:
    """Return a host as it is looked up: percent-decoded, and IDNA-encoded according to UTS 46, as browsers do.

    Raises:
        ValueError: if it is no valid host name.
    """
    if host.isascii() and "%" not in host:
        return host
    try:
        mapped = idna.uts46_remap(unquote(host, errors="strict"), std3_rules=False, transitional=False)
        name = ".".join(_ascii_label(label) for label in mapped.split("."))
    except (idna.IDNAError, UnicodeError) as error:
        raise ValueError(f"no host can be named {host!r}: {error}") from None
    if not name or _FORBIDDEN.search(name):
        raise ValueError(f"no host can be named {host!r}")
    return name


def _ascii_label(label: str) -> str:
    return label if label.isascii() else f"xn--{label.encode('punycode').decode('ascii')}"
