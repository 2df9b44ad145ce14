import json
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest

from imagerag.artifacts import Download
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.download import download
from imagerag.corpus.guard import Reason
from imagerag.corpus.plan import plan
from imagerag.corpus.takedown import remove_images
from imagerag.corpus.url_list import read_url_list
from imagerag.embedded.sample.bad import bad_urls
from imagerag.embedded.sample.server import SampleServer
from imagerag.errors import UserError
from imagerag.settings import Settings
from tests.corpus.downloads import Downloads
from tests.corpus.web import Web, picture
from tests.corpus.whole import attempts_of, images_of

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@pytest.fixture
def downloads(tmp_path: Path, web: Web) -> Downloads:
    return Downloads(tmp_path, web)


def test_every_url_is_tried_once_and_counted(downloads: Downloads, web: Web) -> None:
    good = [{"url": web.serve(f"/ta{i}", picture(i)), "caption": f"picture {i}"} for i in range(9)]
    big = {"url": web.serve("/tbig", picture(1, (600, 300))), "caption": "big", "licence": "MIT"}
    bad = {
        "gone": (web.serve("/tgone", b"", status=404), Reason.HTTP_STATUS),
        "html": (web.serve("/thtml.png", b"<html>"), Reason.UNSUPPORTED_FORMAT),
        "cut": (web.serve("/tcut", picture(2, (300, 300))[:-200]), Reason.CORRUPT_IMAGE),
        "noai": (web.serve("/tnoai", picture(3), X_Robots_Tag="noai"), Reason.OPT_OUT),
        "not us": (web.serve("/tus", picture(3), X_Robots_Tag="imageragturbo: noindex"), Reason.OPT_OUT),
        "tdm": (web.serve("/ttdm", picture(3), tdm_reservation="1"), Reason.OPT_OUT),
        "file": ("file:///etc/passwd/tfile", Reason.BLOCKED_SCHEME),
        "no URL": ("nonsense/tword", Reason.INVALID_URL),
        "inside": (f"http://localhost:{web.port}/tinside", Reason.BLOCKED_ADDRESS),
    }
    rows = [*good, big, *({"url": url, "caption": caption} for caption, (url, _) in bad.items())]
    heard = []
    result = downloads.download(rows, on_progress=lambda done, total, note="": heard.append((done, total)))

    assert downloads.outcome() == (
        {f"a{i}": "success" for i in range(9)}
        | {"big": "success"}
        | {url.partition("/t")[2]: str(reason) for url, reason in bad.values()}
    )
    assert (result.num_urls, result.num_success, result.num_failed, result.num_fetched) == (19, 10, 9, 19)
    assert result.reasons == dict(Counter(str(reason) for _, reason in bad.values()))
    assert result.examples["opt_out"][0] == f"{bad['noai'][0]}: opt_out: X-Robots-Tag"
    assert {reason: len(examples) for reason, examples in result.examples.items()} == {
        reason: min(count, 3) for reason, count in result.reasons.items()
    }
    assert (result.num_removed, result.num_duplicates) == (0, 1)
    assert (heard[0], heard[-1]) == ((0, 19), (19, 19))
    assert result.machine_s > 0
    images = downloads.images()
    assert result.num_bytes == sum(map(len, images.values()))
    wanted = images_of(downloads.corpus).to_pylist()
    assert [row["caption"] for row in wanted] == [*(f"picture {i}" for i in range(9)), "big"]
    assert [images[row["key"]] for row in wanted[:9]] == [picture(i) for i in range(9)]
    assert {key: wanted[9][key] for key in ("source", "licence", "width", "height")} == {
        "source": "test",
        "licence": "MIT",
        "width": 512,
        "height": 256,
    }

    before = web.requests.copy()
    again = downloads.download(rows)
    assert (again.num_fetched, again.num_success, again.reasons) == (0, 10, result.reasons)
    assert web.requests == before


def test_bad_rows_are_failures(downloads: Downloads, web: Web, tmp_path: Path) -> None:
    lines = [web.serve("/tn0", picture(0)), web.serve("/tn1", b"", status=404), "no URL", "", web.url("/tn0")]
    (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{line},c\n" for line in lines))
    config = DownloadConfig(allowed_hosts=(web.host,), retries=0)
    urls = read_url_list(str(tmp_path / "list.csv"))
    result = download(urls, corpus=downloads.corpus, config=config, settings=Settings(home=tmp_path))
    assert (result.num_success, result.num_duplicates) == (1, 1)
    assert result.reasons == {"invalid_row": 2, "http_status": 1}
    assert len(lines) == result.num_success + result.num_failed + result.num_duplicates
    assert result.examples["invalid_row"][1] == "row 4 has a url that is empty"


def test_only_what_is_new_is_fetched_and_what_vanished_is_wanted_no_more(downloads: Downloads, web: Web) -> None:
    rows = [{"url": web.serve(f"/tb{i}", picture(i)), "caption": f"picture {i}"} for i in range(5)]
    downloads.download(rows[:3])
    assert downloads.download(rows[3:4]).num_urls == 4
    rows[0]["caption"] = "renamed"
    rows[1]["licence"] = "MIT"
    before = web.requests.copy()
    result = downloads.download([rows[4], rows[0], rows[1]], mode="replace")
    assert web.requests - before == Counter({"/tb0": 1, "/tb4": 1})
    assert (result.num_urls, result.num_success, result.num_fetched, result.num_removed) == (3, 3, 2, 3)
    wanted = [(row["caption"], row["licence"]) for row in images_of(downloads.corpus).to_pylist()]
    assert wanted == [("picture 4", None), ("renamed", None), ("picture 1", "MIT")]


def test_failures_are_tried_again_when_asked_for(downloads: Downloads, web: Web) -> None:
    rows = [{"url": web.serve(f"/tc{i}", picture(i), status=200 + 204 * (i % 2)), "caption": "c"} for i in range(6)]
    assert downloads.download(rows).reasons == {"http_status": 3}
    web.serve("/tc1", picture(1))
    assert downloads.download(rows).num_fetched == 0
    before = web.requests.copy()
    result = downloads.download(rows, retry_failed=True)
    assert web.requests - before == Counter({"/tc1": 1, "/tc3": 1, "/tc5": 1})
    assert (result.num_success, result.num_failed, result.num_fetched) == (4, 2, 3)
    assert downloads.outcome()["c1"] == "success"


def test_what_may_pass_is_tried_again_by_a_few_runs(downloads: Downloads, web: Web) -> None:
    rows = [
        {"url": web.serve("/tm0", b"", status=404), "caption": "gone"},
        {"url": web.serve("/tm1", b"", status=500), "caption": "broken"},
        {"url": web.serve("/tm2", b"", status=500), "caption": "mended"},
    ]
    assert downloads.download(rows).reasons == {"server_error": 2, "http_status": 1}
    web.serve("/tm2", picture(2))
    result = downloads.download(rows)
    assert (result.num_fetched, result.num_success, result.reasons) == (2, 1, {"server_error": 1, "http_status": 1})
    assert [downloads.download(rows).num_fetched for _ in range(5)] == [1, 1, 1, 0, 0]
    assert web.requests["/tm1"] == 5
    assert downloads.download(rows, retry_failed=True).num_fetched == 2


def _versioned(web: Web, path: str, image: bytes, etag: str) -> str:
    """Serve a picture, or say that it is the one that is known."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        is_known = handler.headers["If-None-Match"] == etag
        handler.send_response(304 if is_known else 200)
        handler.send_header("ETag", etag)
        if not is_known:
            handler.send_header("Content-Length", str(len(image)))
        handler.end_headers()
        if not is_known:
            handler.wfile.write(image)

    web.pages[path] = answer
    return web.url(path)


def test_refresh_finds_changed_pictures(downloads: Downloads, web: Web) -> None:
    same, changed = _versioned(web, "/tn-same", picture(1), '"a"'), _versioned(web, "/tn-changed", picture(2), '"a"')
    urls = {
        "same": same,
        "changed": changed,
        "same, unversioned": web.serve("/tn-plain", picture(3)),
        "gone": web.serve("/tn-gone", picture(4)),
        "opted out": web.serve("/tn-out", picture(5)),
        "stated": web.serve("/tn-stated", picture(6)),
    }
    rows = [{"url": url, "caption": caption} for caption, url in urls.items()]
    downloads.download(rows)
    rows[-1]["sha256"] = images_of(downloads.corpus)["sha256"].to_pylist()[-1]
    before = {row["caption"]: row for row in images_of(downloads.corpus).to_pylist()}
    assert set(before) == set(urls)

    _versioned(web, "/tn-changed", picture(7), '"b"')
    web.serve("/tn-gone", b"", status=404)
    web.serve("/tn-out", picture(5), X_Robots_Tag="noai")
    assert downloads.download(rows).num_fetched == 0
    result = downloads.download(rows, refresh=True)
    assert (result.num_fetched, result.num_unchanged, result.num_changed, result.kept) == (5, 2, 1, {"http_status": 1})
    assert (result.num_success, result.reasons) == (5, {"opt_out": 1})
    after = {row["caption"]: row for row in images_of(downloads.corpus).to_pylist()}
    assert downloads.images()[after["changed"]["key"]] == picture(7)
    assert {name: row for name, row in before.items() if after.get(name) != row}.keys() == {"changed", "opted out"}

    again = downloads.download(rows, refresh=True)
    assert (again.num_fetched, again.num_unchanged, again.num_changed) == (4, 3, 0)
    assert downloads.download(rows).num_fetched == 0


def test_a_workers_user_error_ends_the_run_and_the_next_goes_on(
    downloads: Downloads, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"url": web.serve(f"/to{i}", picture(i)), "caption": f"{i}"} for i in range(12)]

    def fetch_nothing(*_: object) -> None:
        raise UserError("this machine can look up no names")

    with monkeypatch.context() as patched:
        patched.setattr("imagerag.corpus.download._fetch_shard", fetch_nothing)
        with pytest.raises(UserError, match=r"^this machine can look up no names$"):
            downloads.download(rows)
    assert downloads.download(rows).num_success == 12


def test_a_url_has_to_bring_the_same_bytes_again(downloads: Downloads, web: Web) -> None:
    same, changed = ({"url": web.serve(f"/td{i}", picture(i)), "caption": "before"} for i in range(2))
    downloads.download([same, changed])
    recorded = {row["url"]: row["sha256"] for row in images_of(downloads.corpus).to_pylist()}
    web.serve("/td1", picture(100))
    renamed = [{"url": row["url"], "caption": "after"} for row in (same, changed)]
    result = downloads.download(renamed, mode="replace")
    assert (result.num_fetched, result.reasons) == (2, {"hash_mismatch": 1})
    assert images_of(downloads.corpus)["sha256"].to_pylist() == [recorded[same["url"]]]

    assert downloads.download(renamed, retry_failed=True).reasons == {"hash_mismatch": 1}
    web.serve("/td1", picture(1))
    assert downloads.download(renamed, retry_failed=True).reasons == {}
    assert set(images_of(downloads.corpus)["sha256"].to_pylist()) == set(recorded.values())


def test_the_sha256_of_the_list_counts_before_the_recorded_one(downloads: Downloads, web: Web) -> None:
    row = {"url": web.serve("/te", picture(1)), "caption": "e"}
    downloads.download([row])
    other = downloads.download([{"url": web.serve("/te2", picture(2)), "caption": "other"}])
    assert other.num_success == 2
    sha256 = images_of(downloads.corpus)["sha256"].to_pylist()[0]
    row["sha256"] = sha256
    result = downloads.download([row])
    assert (result.num_fetched, result.reasons) == (1, {"hash_mismatch": 1})
    assert downloads.download([row]).num_fetched == 0
    web.serve("/te", picture(2))
    assert downloads.download([row], retry_failed=True).num_success == 2


def test_an_unfinished_download_continues(downloads: Downloads, web: Web) -> None:
    rows = [{"url": web.serve(f"/tf{i}", picture(i)), "caption": f"{i}"} for i in range(12)]
    downloads.download(rows)
    whole = downloads.images()
    marker = downloads.folder / "00000_stats.json"
    marker.write_bytes(marker.read_bytes()[:50])  # killed while it was written
    (downloads.folder / "00001_stats.json").unlink()  # killed just before
    for name in ("00001.tar", "00001.parquet"):
        (downloads.folder / name).write_bytes((downloads.folder / name).read_bytes()[:100])
    assert set(downloads.outcome().values()) == {"success"}
    assert len(downloads.outcome()) == 4

    before = web.requests.copy()
    result = downloads.download(rows)
    assert web.requests - before == Counter({f"/tf{i}": 1 for i in range(8)})
    assert (result.num_success, result.num_fetched) == (12, 8)
    assert downloads.images() == whole
    assert len(attempts_of(downloads.corpus)) == 12


def test_what_an_unfinished_shard_has_that_nobody_wants_any_more_is_not_fetched(downloads: Downloads, web: Web) -> None:
    rows = [{"url": web.serve(f"/tg{i}", picture(i)), "caption": f"{i}"} for i in range(4)]
    downloads.download(rows)
    (downloads.folder / "00000_stats.json").unlink()
    before = web.requests.copy()
    assert downloads.download(rows[1:], mode="replace").num_success == 3
    assert web.requests - before == Counter({f"/tg{i}": 1 for i in range(1, 4)})
    assert downloads.download(rows).num_fetched == 1


def _kill_workers_at(path: str, web: Web, times: int) -> str:
    """Serve a picture, but kill whoever asks for it the first `times` times."""
    web.serve("/then", picture(1))

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if web.requests[path] <= times:
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith("ray::_fetch"):
                    process.kill()
        else:
            web.pages["/then"](handler)

    web.pages[path] = answer
    return web.url(path)


def test_a_shard_whose_worker_is_killed_is_tried_again(downloads: Downloads, web: Web) -> None:
    rows = [{"url": web.serve(f"/ti{i}", picture(i)), "caption": f"{i}"} for i in range(11)]
    rows.append({"url": _kill_workers_at("/ti11", web, times=2), "caption": "11"})
    notes = []
    result = downloads.download(rows, on_progress=lambda done, total, note="": notes.append(note))
    assert (result.num_success, result.num_fetched, result.reasons) == (12, 12, {})
    assert any("lost its worker" in note for note in notes)
    assert set(downloads.outcome()) == {f"i{i}" for i in range(12)}


def test_a_shard_that_is_lost_each_time_is_counted_and_tried_by_the_next_run(
    downloads: Downloads, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagerag.corpus.download._SHARD_RETRIES", 1)
    rows = [{"url": web.serve(f"/tj{i}", picture(i)), "caption": f"{i}"} for i in range(3)]
    poison = {"url": _kill_workers_at("/tj3", web, times=2), "caption": "3"}
    assert downloads.download(rows, config={"shard_size": 1}).num_success == 3
    result = downloads.download([poison])
    assert (result.num_success, result.reasons, result.num_fetched) == (3, {"lost": 1}, 0)
    result = downloads.download([poison])
    assert (result.num_success, result.reasons, result.num_fetched) == (4, {}, 1)


def test_taken_down_images_leave_the_shards_and_stay_away(downloads: Downloads, web: Web) -> None:
    rows = [{"url": web.serve(f"/tk{i}", picture(i)), "caption": f"{i}"} for i in range(4)]
    downloads.download(rows)
    by_url = {row["url"]: row for row in images_of(downloads.corpus).to_pylist()}
    first, second = by_url[rows[0]["url"]], by_url[rows[1]["url"]]
    whole = downloads.images()
    assert remove_images(downloads.corpus, urls=[first["url"]], sha256s=[second["sha256"].upper()]) == 2
    assert remove_images(downloads.corpus, urls=[first["url"]]) == 0
    assert downloads.images() == {
        key: image for key, image in whole.items() if key not in (first["key"], second["key"])
    }
    assert [row["caption"] for row in images_of(downloads.corpus).to_pylist()] == ["2", "3"]

    before = web.requests.copy()
    again = web.serve("/tk-again", picture(1))  # the bytes of the second, at another URL
    rows += [{"url": again, "caption": "again"}, {"url": rows[0]["url"], "caption": "another caption"}]
    result = downloads.download(rows, retry_failed=True)
    assert web.requests - before == Counter({"/tk-again": 1})
    assert (result.num_success, result.reasons) == (2, {"taken_down": 4})
    assert sorted(downloads.images().values()) == sorted([picture(2), picture(3)])


def test_a_hanging_server_does_not_hold_up_the_shard(downloads: Downloads, web: Web) -> None:
    rows = [
        {"url": web.serve_slowly(f"/tl{i}", b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.1), "caption": "l"} for i in range(4)
    ]
    started = time.monotonic()
    assert downloads.download(rows, config={"timeout_s": 1}).reasons == {"timeout": 4}
    assert time.monotonic() - started < 10


def test_the_sample_corpus_with_all_its_bad_urls(downloads: Downloads) -> None:
    with SampleServer() as server:
        rows = server.url_list(limit=150).to_pylist()
        config = {"allowed_hosts": (server.url.removeprefix("http://"),), "shard_size": 100, "timeout_s": 3}
        result = downloads.download(rows, config=config)
        expected = {f"{server.url}{bad.path}": bad.reason or "success" for bad in bad_urls()}
        expected[f"{server.url}/bad/busy-once.png"] = "server_error"
        found = {row["url"]: row["reason"] or row["status"] for row in attempts_of(downloads.corpus).to_pylist()}
        assert found == {row["url"]: expected.get(row["url"], "success") for row in rows}
        assert result.num_fetched == len(rows) == len(attempts_of(downloads.corpus))
        assert result.num_failed == sum(reason != "success" for reason in expected.values())
        again = downloads.download(rows, config=config, retry_failed=True)
        assert (again.num_fetched, again.num_success) == (result.num_failed, result.num_success + 1)


def test_what_is_unchanged_is_not_read_again(downloads: Downloads, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"url": web.serve(f"/t{number}", picture(number)), "caption": "c"} for number in range(5)]
    rows.append({"url": web.serve("/t9", b"", status=404), "caption": "c"})
    planned, times = list[int](), replace(downloads.download(rows), num_fetched=0, num_bytes=0)
    monkeypatch.setattr(
        "imagerag.corpus.download.plan", lambda *args, **options: planned.append(1) or plan(*args, **options)
    )

    def again(**options: Any) -> Download:
        planned.clear()
        return downloads.download(rows, **options)

    def outcome(result: Download) -> Download:
        return replace(result, duration_s=0.0, machine_s=0.0)

    assert outcome(again()) == outcome(times)
    assert planned, "the first of these calls finds that there is nothing to fetch"
    assert outcome(again()) == outcome(times)
    assert not planned
    assert again(retry_failed=True).num_fetched == 1
    again()
    assert planned, "the retry wrote a shard"
    again()
    assert not planned
    remove_images(downloads.corpus, urls=[rows[0]["url"]])
    assert not (downloads.folder / "outcomes.json").exists(), "it may name the URL"
    assert again().reasons == {"http_status": 1, "taken_down": 1}
    rows.append({"url": web.serve("/t10", picture(10)), "caption": "c"})
    assert again().num_fetched == 1


def test_the_marker_is_img2datasets(downloads: Downloads, web: Web) -> None:
    downloads.download([{"url": web.serve("/tm", picture(1)), "caption": "a caption"}])
    assert json.loads((downloads.folder / "00000_stats.json").read_bytes())["successes"] == 1
    with tarfile.open(downloads.corpus.shard(0).tar) as tar:
        assert [name.partition(".")[2] for name in tar.getnames()] == ["jpg", "json", "txt"]
        headers = [entry.offset_data - entry.offset for entry in tar.getmembers()]
        assert headers == [512] * 3, "img2dataset's own writer takes 1,536 bytes for each"
    assert {path.name for path in downloads.folder.iterdir()} == {
        "00000.tar",
        "00000.parquet",
        "00000_stats.json",
        "plan",
        "wanted.parquet",
    }
