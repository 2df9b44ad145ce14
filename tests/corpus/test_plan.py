"""What is planned, in what order, and what is counted, where all fits in memory and where next to nothing does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.acero
import pytest
from fsspec.implementations.local import LocalFileSystem

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.download import _count
from imagerag.corpus.fetch import fetch_shard
from imagerag.corpus.plan import plan, want
from imagerag.corpus.takedown import remove_images
from imagerag.corpus.url_list import SCHEMA
from imagerag.storage import spool
from imagerag.storage.spool import Spool
from tests.corpus.web import Web, picture
from tests.corpus.whole import images_of


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


def planned(corpus: Corpus, **options: bool) -> dict[int, list[str]]:
    work = plan(corpus, 4, **({"retry_failed": False} | options))
    captions = {shard: work.rows(shard)["caption"].to_pylist() for shard in work.num_rows}
    assert {shard: len(own) for shard, own in captions.items()} == work.num_rows
    return {shard.id: own for shard, own in captions.items()}


def fetch(corpus: Corpus, web: Web, *ids: int) -> None:
    work = plan(corpus, 4, retry_failed=False)
    config = DownloadConfig(allowed_hosts=(web.host,), retries=0, thread_count=2)
    for shard in map(corpus.shard, ids):
        fetch_shard(shard, work.rows(shard), config)


def test_a_corpus_from_list_to_list(tmp_path: Path, web: Web) -> None:
    corpus = Corpus(str(tmp_path / "shards"))
    assert want(corpus, rows_of(web, *range(10)), "add") == 0
    shards = {0: ["c0", "c1", "c2", "c3"], 1: ["c4", "c5", "c6", "c7"], 2: ["c8", "c9"]}
    assert planned(corpus) == planned(corpus) == shards, "a plan that was begun is gone on with"
    fetch(corpus, web, 0, 2)
    assert planned(corpus) == {1: shards[1]}
    outcomes = _count(corpus)
    assert (outcomes["num_rows"], outcomes["counts"]) == (10, {"lost": 4, "http_status": 1})
    assert outcomes["examples"]["lost"] == [f"{web.url(f'/{number}')}: lost" for number in (4, 5, 6)]

    # New rows come first; of an unfinished shard, what nobody wants any more is left out.
    assert want(corpus, rows_of(web, 11, 2, 10), "add") == 0
    assert [row["caption"][1:] for rows in corpus.wanted() for row in rows.to_pylist()] == [
        "11",
        "2",
        "10",
        *"013456789",
    ]
    assert planned(corpus) == {1: shards[1], 3: ["c11", "c10"]}
    assert want(corpus, rows_of(web, 9, 7, 6, 0, 10, 11), "replace") == 6
    assert planned(corpus) == {1: ["c6", "c7"], 3: ["c11", "c10"]}
    assert planned(corpus, retry_failed=True) == {1: ["c6", "c7"], 3: ["c11", "c10"], 4: ["c9"]}
    fetch(corpus, web, 1, 3)
    assert [row["caption"] for row in images_of(corpus).to_pylist()] == ["c7", "c6", "c0", "c10", "c11"]

    # A URL that was fetched has to bring what it brought, whatever its caption; what was taken down is not planned.
    remove_images(corpus, urls=[web.url("/7")])
    assert want(corpus, rows_of(web, 0, 1, 7, caption="new "), "add") == 0
    assert planned(corpus)[5] == ["new 0", "new 1"]
    (row, _) = corpus.shard(5).plan().to_pylist()
    recorded = {image["caption"]: image["sha256"] for image in images_of(corpus).to_pylist()}
    assert row["expected_sha256"] == recorded["c0"]
    assert corpus.planned() == [corpus.shard(id) for id in range(6)]


def test_the_same_list_again_changes_nothing(tmp_path: Path, web: Web) -> None:
    corpus = Corpus(str(tmp_path / "shards"))

    def changes(numbers: list[int], mode: Literal["add", "replace"]) -> bool:
        before = corpus.state()
        want(corpus, rows_of(web, *numbers), mode)
        return corpus.state() != before

    a, b = [*range(8)], [6, 7, 8, 9]
    assert changes(a, "add")
    assert not changes(a, "add")
    assert not changes(a, "replace"), "there are no other rows"
    assert changes(b, "add")
    assert not changes(b, "add")
    assert changes(a, "add"), "its rows are the newest now"
    assert changes(a, "replace"), "those of the other list go"
    assert not changes(a, "replace")
    assert changes(a[::-1], "replace"), "another order is another list"
    assert sum(map(len, corpus.wanted())) == 8


def test_a_state_is_another_after_every_change(tmp_path: Path, web: Web) -> None:
    corpus = Corpus(str(tmp_path / "shards"))
    states = [corpus.state()]
    for change in (
        lambda: want(corpus, rows_of(web, *range(8)), "add"),
        lambda: plan(corpus, 4, retry_failed=False),
        lambda: fetch(corpus, web, 0),
        lambda: fetch(corpus, web, 1),
        lambda: corpus.block(urls=[web.url("/1")]),
    ):
        change()
        states.append(corpus.state())
    assert len(set(states)) == len(states)
    plan(corpus, 4, retry_failed=False)
    assert corpus.state() == states[-1]


def test_a_version_is_all_that_a_store_states_about_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stores have different names for it: Azure's has `etag`, Google's `generation`."""
    corpus = Corpus(str(tmp_path))

    def state(**about: object) -> str:
        found = {"shards/wanted.parquet": {"name": "shards/wanted.parquet", "size": 9, **about}}
        monkeypatch.setattr(LocalFileSystem, "find", lambda *_, **__: found)
        return corpus.state()

    assert state(etag="a") == state(etag="a") != state(etag="b")
    assert state(generation=1) != state(generation=2)


def test_planning_goes_on_with_many_begun_shards_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of the list is joined with the begun rows of all others."""
    corpus = Corpus(str(tmp_path / "shards"))
    rows = [{"url": f"u://{number}", "caption": f"{number}", "source": "test"} for number in range(1000)]
    want(corpus, Spool.of(pa.Table.from_pylist(rows, SCHEMA)), "add")
    begun = planned(corpus)
    assert len(begun) == 250
    joined = []
    perform_join = pyarrow.acero._perform_join

    def counting(kind: str, left: pa.Table, keys: object, right: pa.Table, *more: object, **options: object) -> Any:
        joined.append(left.num_rows + right.num_rows)
        return perform_join(kind, left, keys, right, *more, **options)

    monkeypatch.setattr(pyarrow.acero, "_perform_join", counting)
    monkeypatch.setattr(spool, "MEMORY_ROWS", 100)
    assert planned(corpus) == begun
    assert max(joined) < 500
    assert sum(joined) < 10 * len(rows)


def test_rows_of_a_folder_share_shards(tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path / "shards"))
    folders = ["/a", "/b", None, "/a", "/b", "/a", None, "/a", "/a", None]
    rows = [{"url": f"u://{n}", "caption": f"{n}", "folder": folder} for n, folder in enumerate(folders)]
    want(corpus, Spool.of(pa.Table.from_pylist(rows, SCHEMA)), "add")
    captions = planned(corpus)
    assert sorted(captions.values()) == [["0", "3", "5", "7"], ["1", "4"], ["2", "6", "9"], ["8"]]
    for id in captions:
        assert len(corpus.shard(id).plan()["folder"].unique()) == 1
