import multiprocessing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem

from imagerag.corpus import shards, url_list
from imagerag.corpus.ledger import read_ledger
from imagerag.storage.files import ConflictError

PLAN = pa.table({name: ["x", "y"] for name in shards.PLAN_SCHEMA.names})


@pytest.fixture(params=["local", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "shards") if request.param == "local" else f"memory://{tmp_path}/shards"


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    fs, root = shards.open_folder(uri)
    fs.makedirs(root, exist_ok=True)
    return fs, root


def test_an_empty_corpus(uri: str) -> None:
    assert shards.finished_shards(uri) == {}
    assert shards.planned_shards(uri) == []
    assert not shards.is_finished(uri, 0)
    assert shards.read_wanted(uri).schema == url_list.SCHEMA
    assert shards.read_takedowns(uri).num_rows == 0


def test_what_is_written_is_read_back(uri: str) -> None:
    shards.write_plan(uri, 7, PLAN)
    shards.write_plan(uri, 123_456, PLAN.slice(1))
    assert shards.planned_shards(uri) == [7, 123_456]
    assert shards.read_plans(uri, [123_456, 7]) == {123_456: PLAN.slice(1), 7: PLAN}
    wanted = pa.table({name: ["x"] for name in url_list.SCHEMA.names})
    shards.write_wanted(uri, [wanted])
    assert shards.read_wanted(uri) == wanted
    with pytest.raises(ConflictError, match="00007"):
        shards.write_plan(uri, 7, PLAN.slice(1))


def test_a_change_that_another_writer_was_quicker_with_is_made_anew(uri: str) -> None:
    """Without a lock, as a process that was stopped for a minute may be."""
    first, second = ({name: [value] for name in shards.TAKEDOWN_SCHEMA.names} for value in "xy")

    def slow(before: pa.Table) -> pa.Table:
        if before.num_rows == 0:
            shards.update_takedowns(uri, lambda _: pa.table(second))
        return pa.concat_tables([before, pa.table(first)])

    shards.update_takedowns(uri, slow)
    assert shards.read_takedowns(uri)["url"].to_pylist() == ["y", "x"]


def test_files_of_before_have_no_versions(tmp_path: Path) -> None:
    """Plans and shards that were written before servers' versions were kept."""
    uri = str(tmp_path)
    new = ["etag", "last_modified", "known_sha256"]
    (tmp_path / "plan").mkdir()
    pq.write_table(PLAN.drop_columns(new), tmp_path / "plan" / "00000.parquet")
    (plan,) = shards.read_plans(uri, [0]).values()
    assert plan.schema == shards.PLAN_SCHEMA
    assert plan.select(new).to_pylist() == [dict.fromkeys(new)] * 2
    row = {"url": "u", "caption": "c", "status": "success", "key": "000000000", "sha256": "s"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    (found,) = read_ledger(uri).to_pylist()
    assert (found["status"], found["etag"], found["num_failures"]) == ("success", None, 0)


def test_only_a_whole_marker_counts(uri: str) -> None:
    fs, root = filesystem(uri)
    fs.pipe_file(f"{root}/00000_stats.json", b'{"count": 3}')
    fs.pipe_file(f"{root}/00001_stats.json", b'{"count": 3, "succ')
    fs.pipe_file(f"{root}/00002_stats.json", b"")
    assert shards.finished_shards(uri) == {0: {"count": 3}}
    assert [shards.is_finished(uri, shard) for shard in range(4)] == [True, False, False, False]


def test_paths() -> None:
    assert shards.shard_path("s3://bucket/shards/", 12) == "s3://bucket/shards/00012.tar"


def _hold(uri: str, holding: "multiprocessing.synchronize.Event") -> None:
    with shards.locked(uri):
        holding.set()
        multiprocessing.Event().wait()


def test_a_lock_is_waited_for_and_dies_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    holding = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), holding), daemon=True)
    holder.start()
    assert holding.wait(30)
    waited: list[str] = []

    def on_wait(said: str) -> None:
        waited.append(said)
        holder.kill()

    with shards.locked(str(tmp_path), on_wait=on_wait):
        (said,) = waited
        assert f"process {holder.pid}" in said
    with shards.locked(str(tmp_path), on_wait=pytest.fail):
        pass
