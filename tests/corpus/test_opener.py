import datetime
import socket
import ssl
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.guard import FetchError, Reason, reason_of
from imagerag.corpus.names import Names, Resolve
from imagerag.corpus.opener import guarded_opener
from tests.corpus.web import Web

MAX_BYTES = 200_000


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


def fetch(
    url: str, *, allowed: tuple[str, ...] = (), resolve: Resolve = socket.getaddrinfo, timeout: float = 5.0
) -> bytes:
    opener = guarded_opener(DownloadConfig(allowed_hosts=allowed, max_bytes=MAX_BYTES), Names(resolve))
    with opener.open(url, timeout=timeout) as response:
        return bytes(response.read())


def failure(url: str, *, allowed: tuple[str, ...] = ("127.0.0.1",), timeout: float = 5.0) -> Reason:
    with pytest.raises(FetchError) as caught:
        fetch(url, allowed=allowed, timeout=timeout)
    return reason_of(str(caught.value))


def resolving_to(*addresses: str) -> Resolve:
    return lambda _host, port, **_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (it, port)) for it in addresses]


def test_an_allowed_host_is_fetched_with_our_own_name(web: Web) -> None:
    url = web.serve("/fine", b"bytes")
    assert fetch(url, allowed=("127.0.0.1",)) == b"bytes"
    assert fetch(url, allowed=(web.host,)) == b"bytes"
    assert web.user_agents == {DownloadConfig().user_agent}


@pytest.mark.parametrize("url", ["file:///etc/passwd", "data:text/plain,x", "ftp://127.0.0.1/x", "gopher://127.0.0.1/"])
def test_other_schemes_are_refused(url: str) -> None:
    assert failure(url) is Reason.BLOCKED_SCHEME


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "0x7f000001", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_loopback_by_any_name_is_not_even_connected_to(web: Web, host: str) -> None:
    web.serve("/secret", b"secret")
    before = web.requests["/secret"]
    assert failure(f"http://{host}:{web.port}/secret", allowed=("other.example",)) is Reason.BLOCKED_ADDRESS
    assert web.requests["/secret"] == before


def test_being_allowed_holds_for_that_port_only(web: Web) -> None:
    assert failure(web.url("/fine"), allowed=("127.0.0.1:1",)) is Reason.BLOCKED_ADDRESS


def test_one_private_address_among_public_ones_refuses_the_host() -> None:
    with pytest.raises(FetchError, match=r"blocked_address: images\.example is at 10\.1\.2\.3, which is not public"):
        fetch("http://images.example/", resolve=resolving_to("93.184.215.14", "10.1.2.3"))


def test_the_checked_address_is_the_one_connected_to(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: a second look-up could answer with another address, so there is none."""
    web.serve("/fine", b"bytes")
    looked_up = []
    once = resolving_to("127.0.0.1")

    def resolve(host: str, port: int, **options: int) -> list[object]:
        looked_up.append(host)
        return once(host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up elsewhere"))
    assert fetch(f"http://images.example:{web.port}/fine", allowed=("images.example",), resolve=resolve) == b"bytes"
    assert looked_up == ["images.example"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("file:///etc/passwd", Reason.BLOCKED_SCHEME),
        ("ftp://127.0.0.1/x", Reason.BLOCKED_SCHEME),
        ("http://169.254.169.254/latest/meta-data", Reason.BLOCKED_ADDRESS),
        ("http://10.0.0.1/", Reason.BLOCKED_ADDRESS),
        ("//localhost/", Reason.BLOCKED_ADDRESS),
        ("http://user:secret@127.0.0.1/", Reason.INVALID_URL),
        ("/from-here", Reason.REDIRECT_LOOP),
    ],
)
def test_redirects_are_checked_again(web: Web, target: str, reason: Reason) -> None:
    assert failure(web.redirect("/from-here", target)) is reason


def test_five_redirects_are_followed_and_six_are_not(web: Web) -> None:
    web.serve("/hop0", b"arrived")
    for hop in range(1, 7):
        web.redirect(f"/hop{hop}", f"/hop{hop - 1}")
    assert fetch(web.url("/hop5"), allowed=("127.0.0.1",)) == b"arrived"
    assert failure(web.url("/hop6")) is Reason.REDIRECT_LOOP


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user:secret@127.0.0.1/", Reason.INVALID_URL),
        ("http://127.0.0.1:99999/", Reason.INVALID_URL),
        ("http://127.0.0.1:port/", Reason.INVALID_URL),
        ("http:///path", Reason.INVALID_URL),
        ("http://8.8.8.8:25/", Reason.BLOCKED_ADDRESS),
        ("http://no-such-host.invalid/", Reason.DNS_FAILURE),
        ("http://127.0.0.1:1/", Reason.CONNECTION_FAILED),
    ],
)
def test_bad_urls_have_their_reason(url: str, reason: Reason) -> None:
    assert failure(url) is reason


def test_http_errors_carry_the_status(web: Web) -> None:
    with pytest.raises(FetchError, match=r"^http_status: 404$"):
        fetch(web.serve("/gone", b"", status=404), allowed=("127.0.0.1",))


def test_a_file_may_have_the_largest_size_and_not_a_byte_more(web: Web) -> None:
    assert len(fetch(web.serve("/most", bytes(MAX_BYTES)), allowed=("127.0.0.1",))) == MAX_BYTES
    assert failure(web.serve("/more", bytes(MAX_BYTES + 1))) is Reason.TOO_MANY_BYTES


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", bytes(65536)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n", bytes(65536)),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(65536) + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\n", bytes(65536)),
    ],
)
def test_endless_bodies_are_cut_off(web: Web, head: bytes, piece: bytes) -> None:
    assert failure(web.serve_slowly("/endless", head, piece, 0.001)) is Reason.TOO_MANY_BYTES


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\n", b"X-Drip: 1\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x"),
    ],
    ids=["silence", "headers", "body"],
)
def test_a_server_that_drips_holds_no_slot(web: Web, start: bytes, piece: bytes) -> None:
    url = web.serve_slowly("/drip", start, piece, 0.1)
    started = time.monotonic()
    assert failure(url, timeout=0.5) is Reason.TIMEOUT
    assert time.monotonic() - started < 2.0


def test_the_time_of_redirects_counts(web: Web) -> None:
    web.pages["/slow-hop"] = lambda handler: (web.closing.wait(0.4), web.pages["/to-drip"](handler))[1]
    web.redirect("/to-drip", "/silence")
    web.serve_slowly("/silence", b"", b"", 0.1)
    started = time.monotonic()
    assert failure(web.url("/slow-hop"), timeout=0.6) is Reason.TIMEOUT
    assert time.monotonic() - started < 0.95


def test_a_body_shorter_than_announced_is_no_file(web: Web) -> None:
    assert failure(web.serve("/short", b"half", Content_Length="8")) is Reason.CONNECTION_FAILED


def test_reserved_text_and_data_mining_is_respected_unless_told_not_to(web: Web) -> None:
    url = web.serve("/reserved", b"bytes", tdm_reservation="1")
    assert failure(url) is Reason.OPT_OUT
    opener = guarded_opener(DownloadConfig(allowed_hosts=("127.0.0.1",), respect_opt_out=False))
    assert opener.open(url, timeout=5).read() == b"bytes"


def test_proxies_of_the_environment_are_not_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert fetch(web.serve("/direct", b"bytes"), allowed=("127.0.0.1",)) == b"bytes"


def test_hosts_in_other_scripts_are_dialled_as_browsers_do(web: Web) -> None:
    web.serve("/fine", b"bytes")
    asked = []

    def resolve(host: str, port: int, **options: int) -> list[object]:
        asked.append(host)
        return resolving_to("127.0.0.1")(host, port, **options)

    for host in ("bücher.example", "b%C3%BCcher.example", "BÜCHER。example"):
        url = f"http://{host}:{web.port}/fine"
        assert fetch(url, allowed=("bücher.example",), resolve=resolve) == b"bytes"
    assert asked == ["xn--bcher-kva.example"] * 3
    with pytest.raises(FetchError, match="blocked_address"):
        fetch(f"http://bücher.example:{web.port}/fine", resolve=resolve)


def test_a_redirects_cookie_goes_to_the_host_that_set_it(web: Web) -> None:
    seen = []
    web.serve("/end", b"bytes")
    end = web.pages["/end"]
    web.pages["/end"] = lambda handler: (seen.append(handler.headers["Cookie"]), end(handler))[1]
    resolve = resolving_to("127.0.0.1")
    for host in ("a.example", "b.example"):
        target = f"http://{host}:{web.port}/end"
        url = web.serve("/start", b"", 302, Location=target, Set_Cookie="a=1; Path=/").replace("127.0.0.1", "a.example")
        assert fetch(url, allowed=("a.example", "b.example"), resolve=resolve) == b"bytes"
    assert seen == ["a=1", None]


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"Retry_After": "120"}, 120),
        ({"Retry_After": "Sat, 28 Nov 2026 12:02:00 GMT", "Date": "Sat, 28 Nov 2026 12:00:00 GMT"}, 120),
        ({"Retry_After": "Sat, 28 Nov 2020 12:02:00 GMT"}, 0),
        ({"Retry_After": "-1"}, None),
        ({"Retry_After": "1" * 5000}, 111111111),
        ({"Retry_After": "soon"}, None),
        ({}, None),
    ],
)
def test_what_retry_after_asks_for(web: Web, headers: dict[str, str], wait_s: float | None) -> None:
    url = web.serve("/busy", b"", status=503)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response_only(503)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    web.pages["/busy"] = answer
    with pytest.raises(FetchError, match=r"^server_busy: 503$") as caught:
        fetch(url, allowed=("127.0.0.1",))
    assert caught.value.wait_s == wait_s


def test_letters_outside_ascii_are_quoted(web: Web) -> None:
    web.serve("/%C3%A9t%C3%A9.png", b"bytes")
    assert fetch(web.url("/été.png"), allowed=("127.0.0.1",)) == b"bytes"


def test_certificates_are_checked_against_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = _certificate(tmp_path, "images.example")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    allowed = ("images.example", "other.example")
    with Web(tls) as web:
        web.serve("/fine", b"bytes")
        for host in allowed:
            url = f"https://{host}:{web.port}/fine"
            if host == "images.example":
                assert fetch(url, allowed=allowed, resolve=resolving_to("127.0.0.1")) == b"bytes"
            else:
                with pytest.raises(FetchError, match=r"connection_failed: .*Hostname mismatch"):
                    fetch(url, allowed=allowed, resolve=resolving_to("127.0.0.1"))


def _certificate(folder: Path, host: str) -> tuple[Path, Path]:
    """A self-signed certificate for `host`, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths
