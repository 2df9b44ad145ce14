"""One writer at a time, on one machine and, in an object store, on many; whatever the store answers."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from imagerag.corpus import url_list
from imagerag.corpus.corpus import Corpus
from imagerag.retrieval.pins import pin, pins, unpin
from imagerag.retrieval.publish import move_tag, published_rows
from imagerag.retrieval.store import Store
from imagerag.storage import locks
from imagerag.storage.files import ConflictError, keeps_writers_apart, read_tagged, replace_file, write_file
from imagerag.storage.hexadecimal import ID
from imagerag.storage.keyed_table import KeyedTable
from imagerag.storage.lance_table import CommitConflictError
from imagerag.storage.locks import LockLostError, check_locks, named_job, writer_lock
from tests.object_store import BUCKET, FAULTS, Fault, ObjectStore, object_store
from tests.retrieval.rows import ENCODER, make_rows

HOLD = """
import sys, time
from imagerag.storage.locks import named_job, writer_lock
with named_job("ingest brave-otter"), writer_lock(sys.argv[1], "images"):
    print("held", flush=True); time.sleep(600)
"""


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as started:
        yield started


@pytest.fixture
def folder(store: ObjectStore, request: pytest.FixtureRequest) -> Iterator[str]:
    """A folder of the object store, for one test; all faults that it asks for have to happen."""
    yield f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '').replace(' ', '-').replace(',', '')}"
    assert not store.spared, "a fault that did not happen shows nothing"


@pytest.fixture(params=["folder", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path, folder: str) -> str:
    return str(tmp_path) if request.param == "folder" else folder


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_S", 0.6)
    monkeypatch.setattr(locks, "_RENEW_EVERY_S", 0.1)
    monkeypatch.setattr(locks, "_LAST_POLL_S", 0.1)


def holder_of(place: str) -> dict[str, object]:
    content, _ = read_tagged(f"{place}/images.lock")
    return json.loads(content) if content else {}


def start_holder(place: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_others_are_told_who_holds_a_lock_and_wait_until_it_is_released(place: str) -> None:
    said: list[str] = []
    order: list[str] = []

    def second() -> None:
        with writer_lock(place, "images", said.append):
            order.append("second")

    thread = threading.Thread(target=second)
    with writer_lock(place, "images"), writer_lock(place, "images"):
        thread.start()
        while not said:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert "another thread of this process" in said[0]
    assert holder_of(place) == {}
    assert "s3" in place or list(Path(place).iterdir()) == []


def test_a_lock_is_freed_at_once_with_a_process_of_this_machine(place: str) -> None:
    process = start_holder(place)
    said: list[str] = []

    def kill(words: str) -> None:
        said.append(words)
        process.kill()
        process.wait()

    with writer_lock(place, "images", kill):
        assert holder_of(place)["pid"] == os.getpid()
    assert len(said) == 1
    assert f"`ingest brave-otter` (process {process.pid}" in said[0]
    assert " since 20" in said[0]


def test_a_lease_of_another_machine_is_kept_while_it_is_renewed(
    folder: str, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two holders in one process: what is known of the other is in the store alone."""
    first, second = (locks._Lease(f"{folder}/images.lock") for _ in range(2))
    monkeypatch.setattr(locks, "_is_dead", lambda holder: False)
    with named_job("ingest on another machine"):
        first.acquire(pytest.fail)
    said: list[str] = []
    waiting = threading.Thread(target=second.acquire, args=(said.append,))
    waiting.start()
    time.sleep(3 * locks.LEASE_S)
    assert waiting.is_alive()
    assert len(said) == 1
    assert "ingest on another machine" in said[0]
    first.check()

    first._done.set()  # it hangs, and then goes on
    waiting.join(10)
    with pytest.raises(LockLostError, match="taken over by"):
        first.check()
    second.check()
    first.release()
    assert holder_of(folder)["id"] == second._holder["id"], "what others have is not released"
    second.release()
    assert holder_of(folder) == {}


def test_a_lease_that_was_found_lost_while_it_was_renewed_is_lost_at_once(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the time since the last renewal: another process may be writing already."""
    monkeypatch.setattr(locks, "_RENEW_EVERY_S", 0.05)
    lease = locks._Lease(f"{folder}/images.lock")
    lease.acquire(pytest.fail)
    write_file(f"{folder}/images.lock", json.dumps(locks._about_this_job() | {"job": "another"}).encode())
    lease._thread.join(10)  # it ends when it finds out
    with pytest.raises(LockLostError, match="taken over by `another`"):
        lease.check()
    lease.release()
    assert holder_of(folder)["job"] == "another"


def test_a_lost_lock_stops_a_job_before_its_next_commit(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Store(folder, "images")
    images.open_or_create(ENCODER)
    table = KeyedTable.of(folder, "real", {}, [])
    fragments, version = images.write_fragments(make_rows(0, 5)), images.version
    more = table.write_fragments(pa.table({"id": pa.array([b"a" * 20], ID)})), table.dataset().version
    with images.writer_lock():
        check_locks()
        _, tag = read_tagged(f"{folder}/images.lock")
        replace_file(f"{folder}/images.lock", json.dumps(locks._about_this_job()).encode(), tag)
        check_locks()  # others wait for `LEASE_S`, so that nobody asks the store before each commit
        monkeypatch.setattr(locks, "_now", lambda: time.monotonic() + locks.LEASE_S)
        for commit in (lambda: images.commit(fragments, version), lambda: table.commit(*more)):
            with pytest.raises(LockLostError, match="run the same again"):
                commit()
        errors: list[BaseException] = []

        def elsewhere() -> None:
            try:
                check_locks()
            except LockLostError as error:
                errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert not errors, "another job of this process goes on"
    assert (images.count(), table.ids().to_pylist()) == (0, [])


def test_two_writers_of_one_table_never_commit_an_id_twice(place: str) -> None:
    """Without a lock: the second has to look again which ids are missing."""
    table = KeyedTable.of(place, "real", {}, [])
    version = table.dataset().version
    first, second = (table.write_fragments(pa.table({"id": pa.array([b"a" * 20, b"b" * 20], ID)})) for _ in range(2))
    table.commit(first, version)
    with pytest.raises(CommitConflictError):
        table.commit(second, version)
    assert sorted(table.ids().to_pylist()) == [b"a" * 20, b"b" * 20]


@pytest.mark.parametrize("fault", FAULTS)
def test_whole_files_survive_faults_of_the_store(store: ObjectStore, folder: str, fault: Fault) -> None:
    uri = f"{folder}/file"
    store.fail("PUT", "/file", fault)
    write_file(uri, b"content")
    store.fail("GET", "/file", fault)
    assert read_tagged(uri)[0] == b"content"


@pytest.mark.parametrize("fault", ["carried out, then 500", "carried out, then cut", "slow"])
def test_a_conditional_write_knows_its_own(store: ObjectStore, folder: str, fault: Fault) -> None:
    uri = f"{folder}/file"
    store.fail("PUT", "/file", fault)
    tag = replace_file(uri, b"1", None)
    store.fail("PUT", "/file", fault)
    newer = replace_file(uri, b"2", tag)
    assert read_tagged(uri) == (b"2", newer)
    for outdated in (None, tag):
        store.fail("PUT", "/file", fault)
        with pytest.raises(ConflictError):
            replace_file(uri, b"3", outdated)
    assert read_tagged(uri) == (b"2", newer)


def test_a_store_is_found_out_that_does_not_keep_writers_apart(
    store: ObjectStore, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keeps_writers_apart(folder)
    filesystem = fsspec.filesystem("s3")
    write = filesystem.pipe_file
    monkeypatch.setattr(filesystem, "pipe_file", lambda path, content, **condition: write(path, content))
    assert not keeps_writers_apart(folder)
    assert not filesystem.exists(folder)


def test_a_store_that_is_gone_is_no_conflict(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    tag = replace_file(f"{folder}/file", b"1", None)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(fsspec.filesystem("s3"), "pipe_file", fail)
    with pytest.raises(OSError, match="no route"):
        replace_file(f"{folder}/file", b"2", tag)


@pytest.mark.parametrize("fault", ["carried out, then 500", "carried out, then cut"])
def test_a_lease_survives_faults_of_the_store(
    store: ObjectStore, folder: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_RENEW_EVERY_S", 0.05)
    store.fail("PUT", "/images.lock", fault, fault)
    store.fail("GET", "/images.lock", fault)
    with writer_lock(folder, "images"):
        while holder_of(folder)["renewed"] < 2:  # type: ignore[operator]
            time.sleep(0.01)
        check_locks()
        store.fail("PUT", "/images.lock", fault)
    assert holder_of(folder) == {}
    with writer_lock(folder, "images", pytest.fail):
        pass


@pytest.mark.parametrize("fault", FAULTS)
def test_commits_survive_faults_of_the_store(store: ObjectStore, folder: str, fault: Fault) -> None:
    """A manifest that was stored and answered by an error must not be appended to again, as by another writer."""
    images = Store(folder, "images")
    images.open_or_create(ENCODER)
    with images.writer_lock():
        version = images.version
        store.fail("PUT", "/images.lance/data/", fault)
        fragments = images.write_fragments(make_rows(0, 5))
        store.fail("PUT", "/images.lance/_versions/", fault)
        assert images.commit(fragments, version) == version + 1
    assert sorted(images.ids().to_pylist()) == sorted(make_rows(0, 5)["id"].to_pylist())
    store.fail("PUT", "/images.lance/_versions/", fault)
    assert images.delete(make_rows(0, 1)["id"].combine_chunks()) == 1
    assert images.count() == 4
    store.fail("PUT", "/images.lance/_refs/", fault, fault)
    move_tag(images, images.version)
    assert published_rows(images) == 4
    store.fail("PUT", "/images.lance/_refs/", fault)
    pin(images, images.version, "model-1")
    assert pins(images) == {"model-1": images.version}
    store.fail("POST", "?delete", fault)
    unpin(images, "model-1")
    assert pins(images) == {}


def test_two_downloads_of_one_corpus_lose_no_row(folder: str) -> None:
    corpus = Corpus(f"{folder}/shards")
    rows = [pa.table({name: [value] for name in url_list.SCHEMA.names}) for value in "abcd"]

    def add(own: pa.Table) -> None:
        with corpus.lock():
            corpus.want([*corpus.wanted(), own])

    threads = [threading.Thread(target=add, args=(own,)) for own in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(url for rows in corpus.wanted() for url in rows["url"].to_pylist()) == ["a", "b", "c", "d"]
