import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagerag.corpus import url_list
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.ledger import read_parts
from imagerag.corpus.shards import PLAN_SCHEMA
from imagerag.storage.files import ConflictError, read_tagged
from tests.object_store import BUCKET, object_store

PLAN = pa.table({name: ["x", "y"] for name in PLAN_SCHEMA.names})


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with object_store():
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["local", "memory", "object store"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    place = {"local": "", "memory": "memory://"}.get(request.param)
    return Corpus(f"{request.getfixturevalue('store') if place is None else place}{tmp_path}/shards")


def test_an_empty_corpus(corpus: Corpus) -> None:
    assert corpus.finished() == []
    assert corpus.planned() == []
    assert not corpus.shard(0).is_finished()
    assert list(corpus.wanted()) == []
    assert corpus.takedowns().num_rows == 0


def test_what_is_written_is_read_back(corpus: Corpus) -> None:
    first, second = corpus.shard(7), corpus.shard(123_456)
    second.write_plan(PLAN.slice(1))
    first.write_plan(PLAN)
    assert corpus.planned() == [first, second]
    assert list(corpus.plans([second, first])) == [PLAN.slice(1), PLAN]
    wanted = pa.table({name: ["x"] for name in url_list.SCHEMA.names})
    corpus.want([wanted])
    assert list(corpus.wanted()) == [wanted]
    with pytest.raises(ConflictError, match="00007"):
        first.write_plan(PLAN.slice(1))


def test_what_is_taken_down_stays_so_and_is_listed_once(corpus: Corpus) -> None:
    corpus.block(urls=["x"], sha256s=["1", "2"])
    corpus.block(urls=["x", "y"], sha256s=["2"])
    rows = {(row["url"], row["sha256"]) for row in corpus.takedowns().to_pylist()}
    assert rows == {("x", None), ("y", None), (None, "1"), (None, "2")}
    assert corpus.takedowns().num_rows == 4


def test_a_takedown_that_another_was_quicker_than_is_made_anew(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a lock, as a process that was stopped for a minute may be."""

    def read_slowly(uri: str) -> tuple[bytes | None, str | None]:
        found = read_tagged(uri)
        monkeypatch.undo()
        corpus.block(urls=["quicker"])
        return found

    monkeypatch.setattr("imagerag.corpus.corpus.read_tagged", read_slowly)
    corpus.block(urls=["slow"])
    assert sorted(corpus.takedowns()["url"].to_pylist()) == ["quicker", "slow"]


def test_files_of_before_have_no_versions(tmp_path: Path) -> None:
    """Plans and shards that were written before servers' versions were kept."""
    corpus, new = Corpus(str(tmp_path)), ["etag", "last_modified", "known_sha256"]
    (tmp_path / "plan").mkdir()
    pq.write_table(PLAN.drop_columns(new), tmp_path / "plan" / "00000.parquet")
    plan = corpus.shard(0).plan()
    assert plan.schema == PLAN_SCHEMA
    assert plan.select(new).to_pylist() == [dict.fromkeys(new)] * 2
    row = {"url": "u", "caption": "c", "status": "success", "key": "000000000", "sha256": "s"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    corpus.want([pa.Table.from_pylist([{"url": "u", "caption": "c"}], url_list.SCHEMA)])
    ((_, ledger),) = read_parts(corpus)
    (found,) = ledger.to_pylist()
    assert (found["status"], found["etag"], found["num_failures"]) == ("success", None, 0)


def test_only_a_whole_marker_counts(corpus: Corpus) -> None:
    fs, root = corpus.open()
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/00000_stats.json", b'{"count": 3}')
    fs.pipe_file(f"{root}/00001_stats.json", b'{"count": 3, "succ')
    fs.pipe_file(f"{root}/00002_stats.json", b"")
    assert corpus.finished() == [corpus.shard(0)]
    assert [corpus.shard(id).is_finished() for id in range(4)] == [True, False, False, False]


def test_it_is_its_place_and_travels() -> None:
    corpus = Corpus("s3://bucket/shards/")
    assert corpus == Corpus("s3://bucket/shards") == pickle.loads(pickle.dumps(corpus))
    assert corpus.shard(12).tar == "s3://bucket/shards/00012.tar"


def _hold(corpus: Corpus, holding: "multiprocessing.synchronize.Event") -> None:
    with corpus.lock():
        holding.set()
        multiprocessing.Event().wait()


def test_a_lock_is_waited_for_and_dies_with_its_process(tmp_path: Path) -> None:
    corpus, context = Corpus(str(tmp_path)), multiprocessing.get_context("spawn")
    holding = context.Event()
    holder = context.Process(target=_hold, args=(corpus, holding), daemon=True)
    holder.start()
    assert holding.wait(30)
    waited: list[str] = []

    def on_wait(said: str) -> None:
        waited.append(said)
        holder.kill()

    with corpus.lock(on_wait=on_wait):
        (said,) = waited
        assert f"process {holder.pid}" in said
    with corpus.lock(on_wait=pytest.fail):
        pass
