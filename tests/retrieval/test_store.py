import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from imagerag.errors import UserError
from imagerag.retrieval.schema import EncoderIdentity
from imagerag.retrieval.store import CommitConflictError, Store, compact, list_stores
from tests.retrieval.rows import DIM, ENCODER, append, make_rows


def data_files(store: Store) -> set[Path]:
    return set(Path(store.table_uri, "data").iterdir())


def test_missing_table_is_reported(tmp_path: Path) -> None:
    missing = Store(str(tmp_path), "images")
    assert not missing.exists
    with pytest.raises(UserError, match=r"no table 'images'.*imagerag ingest"):
        missing.count()


def test_missing_version_is_reported(store: Store) -> None:
    with pytest.raises(UserError, match=r"version 99 of table 'images'.*is gone"):
        store.dataset(99)


def test_stores_are_listed(store: Store, tmp_path: Path) -> None:
    other = Store(store.uri, "art")
    other.open_or_create(ENCODER)
    Store(store.uri, "art.blocked").create(ENCODER)
    assert list_stores(store.uri) == [other, store]
    assert list_stores(str(tmp_path / "nowhere")) == []
    assert not (tmp_path / "nowhere").exists()


def test_rows_round_trip(store: Store) -> None:
    rows = make_rows(0, 5)
    append(store, rows)
    read = store.dataset().to_table()
    assert read.equals(rows)
    assert store.count() == 5
    assert set(store.ids().to_pylist()) == set(rows["id"].to_pylist())


def test_another_encoder_is_refused(store: Store) -> None:
    store.open_or_create(ENCODER)
    other = EncoderIdentity(id="encoder-b", digest="b" * 64, dim=DIM)
    with pytest.raises(UserError, match=f"encoder-a.*{'a' * 64}.*encoder-b.*{'b' * 64}"):
        store.open_or_create(other)
    assert store.encoder == ENCODER


def test_nothing_is_visible_before_the_commit(store: Store) -> None:
    version = store.version
    fragments = [fragment for i in range(3) for fragment in store.write_fragments(make_rows(i * 5, i * 5 + 5))]
    assert (store.version, store.count()) == (version, 0)
    assert store.commit(fragments, version) == store.version == version + 1
    assert store.count() == 15


def test_fragments_of_another_process_are_committed(store: Store) -> None:
    script = (
        "import pickle, sys; from tests.retrieval.rows import make_rows; "
        "store = pickle.loads(bytes.fromhex(sys.argv[1])); print(*store.write_fragments(make_rows(0, 7)), sep='\\n')"
    )
    command = [sys.executable, "-c", script, pickle.dumps(store).hex()]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    store.commit(output.splitlines(), store.version)
    assert store.dataset().to_table().equals(make_rows(0, 7))


def test_a_commit_without_fragments_changes_nothing(store: Store) -> None:
    version = store.version
    assert store.commit([], version) == version == store.version


def test_a_commit_on_an_outdated_read_is_refused(store: Store) -> None:
    read_version = store.version
    fragments = store.write_fragments(make_rows(0, 5))
    append(store, make_rows(5, 8))
    with pytest.raises(CommitConflictError, match=f"read at version {read_version} and is now at {read_version + 1}"):
        store.commit(fragments, read_version)
    assert store.count() == 3


def test_fragments_grow_with_the_table_a_part_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagerag.retrieval.store._FRAGMENT_ROWS", 8)
    monkeypatch.setattr("imagerag.retrieval.store._MOST_FRAGMENTS", 4)
    for start in range(0, 128, 8):
        append(store, make_rows(start, start + 8))
    append(store, make_rows(128, 130))
    append(store, make_rows(130, 132))
    sizes = []
    for _ in range(12):
        compact(store.dataset(), deleted_share=0.1)
        sizes.append([fragment.count_rows() for fragment in store.dataset().get_fragments()])
    assert (max(sizes[0]), sizes[0].count(8)) == (64, 8), "one fragment at a time"
    assert max(map(max, sizes)) < 2 * 64
    assert len(sizes[-1]) <= 4
    assert sizes[-1] == sizes[-2], "what is large is left alone"
    assert store.dataset().to_table(columns=["id"]).equals(make_rows(0, 132).select(["id"]))


def test_of_two_commits_at_once_one_wins(store: Store) -> None:
    """Without the lock, as on an object store: both pass the first check, and Lance would accept both."""
    read_version = store.version
    writes = [store.write_fragments(make_rows(0, 5)), store.write_fragments(make_rows(0, 5))]
    barrier, outcomes = threading.Barrier(2), []

    def commit(fragments: list[str]) -> None:
        barrier.wait()
        try:
            store.commit(fragments, read_version)
            outcomes.append("committed")
        except CommitConflictError:
            outcomes.append("conflict")

    threads = [threading.Thread(target=commit, args=(fragments,)) for fragments in writes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["committed", "conflict"]
    assert sorted(store.ids().to_pylist()) == sorted(make_rows(0, 5)["id"].to_pylist())


def test_delete(store: Store) -> None:
    rows = make_rows(0, 10)
    append(store, rows)
    assert store.delete(rows["id"].combine_chunks()[:4]) == 4
    assert set(store.ids().to_pylist()) == set(rows["id"].to_pylist()[4:])


def test_rows_that_are_there_twice_are_both_deleted(store: Store) -> None:
    append(store, make_rows(0, 3))
    append(store, make_rows(0, 1))
    assert store.delete(make_rows(0, 1)["id"].combine_chunks()) == 2
    assert store.count() == 2


def test_deleting_what_is_not_there_changes_nothing(store: Store) -> None:
    append(store, make_rows(0, 3))
    version = store.version
    assert store.delete(["absent", "it's absent"]) == 0
    assert (store.version, store.count()) == (version, 3)


def test_many_rows_are_deleted_at_once(store: Store) -> None:
    append(store, make_rows(0, 100))
    version = store.version
    ids = [f"{i:040x}" for i in range(100_000)] + make_rows(0, 50)["id"].to_pylist()
    assert store.delete(ids) == 50
    assert store.version == version + 1


def test_clean_up_removes_what_a_killed_writer_left(store: Store) -> None:
    append(store, make_rows(0, 5))
    committed = data_files(store)
    store.write_fragments(make_rows(5, 10))
    assert len(data_files(store)) == len(committed) + 1
    with store.writer_lock():
        store.clean_up()
    assert data_files(store) == committed
    assert store.count() == 5


def test_clean_up_keeps_tagged_versions_only(store: Store) -> None:
    append(store, make_rows(0, 5))
    store.dataset().tags.create("kept", store.version)
    kept = store.version
    store.delete(make_rows(0, 1)["id"].combine_chunks())
    dropped = store.version
    append(store, make_rows(5, 6))
    store.clean_up()
    assert store.dataset(kept).count_rows() == 5
    with pytest.raises(UserError, match="is gone"):
        store.dataset(dropped)
    assert store.count() == 5


def test_writers_wait_for_each_other(store: Store) -> None:
    entered = threading.Event()
    times = {}

    def second() -> None:
        entered.set()
        with store.writer_lock():
            times["second"] = time.monotonic()

    thread = threading.Thread(target=second)
    with store.writer_lock(), store.writer_lock():
        thread.start()
        entered.wait()
        time.sleep(0.3)
        times["first left"] = time.monotonic()
    thread.join(timeout=10)
    assert times["second"] >= times["first left"]


def test_the_lock_of_a_killed_process_is_freed(store: Store) -> None:
    script = (
        "import sys, time; from imagerag.retrieval.store import Store\n"
        "with Store(sys.argv[1], 'images').writer_lock():\n    print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, store.uri], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        process.kill()
    with store.writer_lock():
        append(store, make_rows(0, 1))
    assert store.count() == 1
