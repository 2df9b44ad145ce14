"""The sample corpus as a web site: its drawings, its list, and every bad URL answered as it says."""

import http.client
import io
import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from imagerag.corpus.guard import Reason
from imagerag.embedded.sample import load_drawings
from imagerag.embedded.sample.server import BAD_URLS, HOST, SampleServer, remembered_port, write_url_list
from imagerag.errors import UserError


@pytest.fixture(scope="module")
def server() -> Iterator[SampleServer]:
    with SampleServer() as server:
        yield server


def _connect(server: SampleServer, timeout_s: float = 10) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(HOST, int(server.url.rpartition(":")[2]), timeout=timeout_s)


def _get(server: SampleServer, path: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = _connect(server)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def test_drawings_are_served_over_one_connection(server: SampleServer) -> None:
    connection = _connect(server)
    for drawing in load_drawings(styles=["noto"])[:3]:
        connection.request("GET", f"/noto/{drawing.concept.codepoint}.webp")
        response = connection.getresponse()
        assert (response.status, response.headers["Content-Type"]) == (200, "image/webp")
        assert response.read() == drawing.image
        assert response.headers["ETag"]
    connection.close()


def test_an_unknown_path_is_not_found(server: SampleServer) -> None:
    assert _get(server, "/noto/nothing.webp")[0].status == 404


def test_the_list_holds_every_drawing_and_every_bad_url_once(server: SampleServer) -> None:
    table = server.url_list()
    assert table.column_names == ["url", "caption", "source", "licence"]
    urls = table["url"].to_pylist()
    assert len(urls) == len(set(urls)) == len(load_drawings()) + len(BAD_URLS)
    assert {server.url + bad.path for bad in BAD_URLS} <= set(urls)
    row = table.to_pylist()[urls.index(f"{server.url}/twemoji/1f349.webp")]
    assert (row["caption"], row["source"], row["licence"]) == ("watermelon", "Twemoji", "CC-BY-4.0")
    assert server.url_list().equals(table)


def test_a_short_list_mixes_styles_and_keeps_every_bad_url(server: SampleServer) -> None:
    short, longer = server.url_list(limit=60), server.url_list(limit=90)
    assert short.num_rows == 60 + len(BAD_URLS)
    assert set(short["url"].to_pylist()) < set(longer["url"].to_pylist())
    assert len(set(short["source"].to_pylist())) == 7
    assert short["source"].to_pylist()[-len(BAD_URLS) :] != ["bad URLs"] * len(BAD_URLS)


def test_every_reason_is_one_of_the_guards() -> None:
    assert {bad.reason for bad in BAD_URLS} - {None} <= set(Reason)
    assert len({bad.path for bad in BAD_URLS}) == len(BAD_URLS)


def test_missing_and_busy() -> None:
    with SampleServer() as fresh:
        assert _get(fresh, "/bad/missing.png")[0].status == 404
        assert _get(fresh, "/bad/busy-once.png")[0].status == 500
        response, body = _get(fresh, "/bad/busy-once.png")
        assert response.status == 200
        assert Image.open(io.BytesIO(body)).size == (64, 64)


def test_silence_lasts_longer_than_a_client_waits(server: SampleServer) -> None:
    connection = _connect(server, timeout_s=0.5)
    connection.request("GET", "/bad/silent.png")
    with pytest.raises(TimeoutError):
        connection.getresponse()
    connection.close()


def test_the_truncated_jpeg_has_a_header_and_no_end(server: SampleServer) -> None:
    response, body = _get(server, "/bad/truncated.jpg")
    assert response.headers["Content-Type"] == "image/jpeg"
    image = Image.open(io.BytesIO(body))
    assert image.format == "JPEG"
    with pytest.raises(OSError, match="truncated"):
        image.load()


def test_the_page_and_the_drawing_are_no_images(server: SampleServer) -> None:
    response, body = _get(server, "/bad/page.png")
    assert response.status == 200
    assert body.startswith(b"<!doctype html>")
    response, body = _get(server, "/bad/entity.svg")
    assert response.headers["Content-Type"] == "image/svg+xml"
    assert b'SYSTEM "file:///etc/passwd"' in body


def test_the_bomb_is_small_and_claims_to_be_large(server: SampleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    _, body = _get(server, "/bad/bomb.png")
    assert len(body) < 10_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert Image.open(io.BytesIO(body)).size == (30_000, 30_000)


def test_the_endless_body_has_no_length(server: SampleServer) -> None:
    connection = _connect(server)
    connection.request("GET", "/bad/endless.jpg")
    response = connection.getresponse()
    assert response.headers["Content-Length"] is None
    assert len(response.read(20_000_000)) == 20_000_000
    connection.close()


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/bad/loop-a.png", "/bad/loop-b.png"),
        ("/bad/loop-b.png", "/bad/loop-a.png"),
        ("/bad/to-file.png", "file:///etc/passwd"),
        ("/bad/to-private.png", "http://10.255.255.1/x.png"),
        ("/bad/to-metadata.png", "http://169.254.169.254/latest/meta-data/"),
    ],
)
def test_redirects(server: SampleServer, path: str, location: str) -> None:
    response, _ = _get(server, path)
    assert (response.status, response.headers["Location"]) == (302, location)


def test_opt_outs_and_twins(server: SampleServer) -> None:
    assert _get(server, "/bad/noai.png")[0].headers["X-Robots-Tag"] == "noai"
    assert _get(server, "/bad/tdm.png")[0].headers["tdm-reservation"] == "1"
    assert _get(server, "/bad/twin-a.png")[1] == _get(server, "/bad/twin-b.png")[1]


def test_a_home_keeps_its_port(tmp_path: Path) -> None:
    port = remembered_port(tmp_path)
    assert remembered_port(tmp_path) == port
    assert (tmp_path / "sample" / "port").read_text() == str(port)
    with SampleServer(port) as server:
        assert server.url == f"http://{HOST}:{port}"
    assert remembered_port(tmp_path) == port


def test_a_port_in_use_is_the_users_to_free(tmp_path: Path) -> None:
    port = remembered_port(tmp_path)
    with socket.create_server((HOST, port)):
        with pytest.raises(UserError, match=f"port {port} .*stop it .*or delete .*port to move"):
            remembered_port(tmp_path)
        with pytest.raises(UserError, match=f"needs port {port}"):
            SampleServer(port)


def test_the_list_is_written_at_once(server: SampleServer, tmp_path: Path) -> None:
    path = write_url_list(server, tmp_path, limit=5)
    assert pq.read_table(path).equals(server.url_list(limit=5))
    assert [entry.name for entry in path.parent.iterdir()] == ["urls.parquet"]
