"""Rules for fetching from untrusted servers, which `opener` and `fetch` enforce, and reasons why a fetch can fail."""

import ipaddress
import time
from enum import StrEnum
from threading import Condition

from imagerag.plain import printable

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Not public, though `ipaddress` calls them global (the first only in early releases of Python 3.11): protocol
# assignments, with a cloud's metadata service among them; 6to4 relays; another cloud's services; site-local.
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "fec0::/10")))


class Reason(StrEnum):
    """Reason why a URL has no image in the corpus. The next run retries URLs whose reason is `PASSING`."""

    INVALID_ROW = "invalid_row"
    """A row of a list whose URL or caption is missing or invalid."""
    INVALID_URL = "invalid_url"
    BLOCKED_SCHEME = "blocked_scheme"
    BLOCKED_ADDRESS = "blocked_address"
    DNS_FAILURE = "dns_failure"
    CONNECTION_FAILED = "connection_failed"
    TIMEOUT = "timeout"
    HOST_DOWN = "host_down"
    """Skipped, because the host only failed, or asked for too long a wait."""
    SERVER_BUSY = "server_busy"
    """Status 429 or 503, which ask to try again later."""
    SERVER_ERROR = "server_error"
    """Another status that means a failure of the server rather than of the request."""
    HTTP_STATUS = "http_status"
    REDIRECT_LOOP = "redirect_loop"
    TOO_MANY_BYTES = "too_many_bytes"
    OPT_OUT = "opt_out"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TOO_MANY_PIXELS = "too_many_pixels"
    CORRUPT_IMAGE = "corrupt_image"
    HASH_MISMATCH = "hash_mismatch"
    UNREADABLE_FILE = "unreadable_file"
    OUTSIDE_FOLDER = "outside_folder"
    """A link in a folder to a file outside it."""
    TAKEN_DOWN = "taken_down"
    LOST = "lost"
    """Every worker that fetched its shard died."""
    OTHER = "other"


PASSING = frozenset(
    {
        Reason.DNS_FAILURE,
        Reason.CONNECTION_FAILED,
        Reason.TIMEOUT,
        Reason.HOST_DOWN,
        Reason.SERVER_BUSY,
        Reason.SERVER_ERROR,
        Reason.LOST,
    }
)
"""Reasons of transient failures; all others persist until the list, the server or the configuration changes."""

UNREACHABLE = frozenset({Reason.DNS_FAILURE, Reason.CONNECTION_FAILED, Reason.TIMEOUT})
"""Reasons that mean that the host did not answer."""

BUSY_STATUSES = frozenset({429, 503})
SERVER_ERROR_STATUSES = frozenset({408, 425, 500, 502, 504})

_REASONS = {str(reason): reason for reason in Reason}


class FetchError(Exception):
    """A URL gives no image. The message is `<reason>: <detail>`, which is stored as the row's `error_message`."""

    def __init__(self, reason: Reason, detail: str, wait_s: float | None = None) -> None:
        super().__init__(f"{reason}: {printable(detail)}")  # it may quote a server
        self.reason = reason
        self.wait_s = wait_s
        """Seconds that the host asks to wait, if it does."""


def reason_of(error_message: str | None) -> Reason:
    """Return the reason that a failed row's `error_message` begins with."""
    return _REASONS.get((error_message or "").partition(":")[0], Reason.OTHER)


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public internet.

    IPv6 addresses that embed an IPv4 address (mapped, 6to4, NAT64) are judged by the IPv4 address.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour
        if carried is not None:
            return is_public(str(carried))
    return (
        ip.is_global
        and not (ip.is_multicast or ip.is_reserved)
        and not any(ip in network for network in _NOT_PUBLIC if network.version == ip.version)
    )


class ByteBudget:
    """Limit on the bytes of fetched files that all threads together hold until they are stored."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._returned = Condition()

    def take(self, num_bytes: int) -> float:
        """Wait until `num_bytes` are left and take them; return how many seconds that took."""
        started = time.monotonic()
        with self._returned:
            self._returned.wait_for(lambda: num_bytes <= self._left)
            self._left -= num_bytes
        return time.monotonic() - started

    def give_back(self, num_bytes: int) -> None:
        """Return bytes to the budget."""
        with self._returned:
            self._left += num_bytes
            self._returned.notify_all()
