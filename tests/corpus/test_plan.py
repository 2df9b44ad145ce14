"""What is planned, in what order, and what is counted, where all fits in memory and where next to nothing does."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.download import _count, _plan, _want
from imagerag.corpus.fetch import fetch_shard
from imagerag.corpus.ledger import wanted_images
from imagerag.corpus.shards import planned_shards, read_plans, read_wanted
from imagerag.corpus.takedown import take_down
from imagerag.corpus.url_list import SCHEMA
from imagerag.storage import spool
from imagerag.storage.spool import Spool
from tests.corpus.web import Web, picture


@pytest.fixture(params=[2**18, 3], autouse=True)
def memory_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MEMORY_ROWS", request.param)
    monkeypatch.setattr(spool, "NUM_PARTS", 8)


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with Web() as server:
        for number in range(12):
            server.serve(f"/{number}", picture(number), 404 if number % 5 == 4 else 200)
        yield server


def rows_of(web: Web, *numbers: int, caption: str = "c") -> Spool:
    rows = [{"url": web.url(f"/{number}"), "caption": f"{caption}{number}", "source": "test"} for number in numbers]
    return Spool.of(pa.Table.from_pylist(rows, SCHEMA))


def plan(uri: str, **options: bool) -> dict[int, list[str]]:
    work = _plan(uri, 4, **({"retry_failed": False} | options))
    planned = {shard: work.rows(shard)["caption"].to_pylist() for shard in work.num_rows}
    assert {shard: len(captions) for shard, captions in planned.items()} == work.num_rows
    return planned


def fetch(uri: str, web: Web, *shards: int) -> None:
    work = _plan(uri, 4, retry_failed=False)
    config = DownloadConfig(allowed_hosts=(web.host,), retries=0, thread_count=2)
    for shard in shards:
        fetch_shard(uri, shard, work.rows(shard), config)


def test_a_corpus_from_list_to_list(tmp_path: Path, web: Web) -> None:
    uri = str(tmp_path / "shards")
    assert _want(uri, rows_of(web, *range(10)), "add") == 0
    shards = {0: ["c0", "c1", "c2", "c3"], 1: ["c4", "c5", "c6", "c7"], 2: ["c8", "c9"]}
    assert plan(uri) == plan(uri) == shards, "a plan that was begun is gone on with"
    fetch(uri, web, 0, 2)
    assert plan(uri) == {1: shards[1]}
    num_rows, counts, examples = _count(uri)
    assert (num_rows, counts) == (10, {"lost": 4, "http_status": 1})
    assert examples["lost"] == tuple(f"{web.url(f'/{number}')}: lost" for number in (4, 5, 6))

    # New rows come first; of an unfinished shard, what nobody wants any more is left out.
    assert _want(uri, rows_of(web, 11, 2, 10), "add") == 0
    assert [row["caption"][1:] for row in read_wanted(uri).to_pylist()] == ["11", "2", "10", *"013456789"]
    assert plan(uri) == {1: shards[1], 3: ["c11", "c10"]}
    assert _want(uri, rows_of(web, 9, 7, 6, 0, 10, 11), "replace") == 6
    assert plan(uri) == {1: ["c6", "c7"], 3: ["c11", "c10"]}
    assert plan(uri, retry_failed=True) == {1: ["c6", "c7"], 3: ["c11", "c10"], 4: ["c9"]}
    fetch(uri, web, 1, 3)
    assert [row["caption"] for row in wanted_images(uri).to_pylist()] == ["c7", "c6", "c0", "c10", "c11"]

    # A URL that was fetched has to bring what it brought, whatever its caption; what was taken down is not planned.
    take_down(uri, urls=[web.url("/7")])
    assert _want(uri, rows_of(web, 0, 1, 7, caption="new "), "add") == 0
    assert plan(uri)[5] == ["new 0", "new 1"]
    (row, _) = read_plans(uri, [5])[5].to_pylist()
    recorded = {image["caption"]: image["sha256"] for image in wanted_images(uri).to_pylist()}
    assert row["expected_sha256"] == recorded["c0"]
    assert planned_shards(uri) == [0, 1, 2, 3, 4, 5]


def test_rows_of_a_folder_share_shards(tmp_path: Path) -> None:
    uri = str(tmp_path / "shards")
    folders = ["/a", "/b", None, "/a", "/b", "/a", None, "/a", "/a", None]
    rows = [{"url": f"u://{n}", "caption": f"{n}", "folder": folder} for n, folder in enumerate(folders)]
    _want(uri, Spool.of(pa.Table.from_pylist(rows, SCHEMA)), "add")
    planned = plan(uri)
    assert sorted(planned.values()) == [["0", "3", "5", "7"], ["1", "4"], ["2", "6", "9"], ["8"]]
    for shard in planned:
        assert len(read_plans(uri, [shard])[shard]["folder"].unique()) == 1
