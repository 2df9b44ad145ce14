import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from imagerag.errors import UserError
from imagerag.retrieval.schema import EncoderIdentity
from imagerag.retrieval.store import Store, list_stores
from imagerag.retrieval.takedown import holds
from imagerag.storage.lance_table import LanceTable
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


def test_a_table_of_an_early_version_is_refused_and_may_have_any_row(tmp_path: Path) -> None:
    store, ids = Store(str(tmp_path), "images"), make_rows(0, 1)["id"].combine_chunks()
    LanceTable(store.uri, store.name).append(pa.table({"id": ["0" * 40]}))
    with pytest.raises(UserError, match=rf"whose ids were texts: delete {store.table_uri} and run the ingest again"):
        store.dataset()
    early = store.find()
    assert early is not None
    assert holds(early, ids)


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


def test_fragments_of_another_process_are_committed(store: Store) -> None:
    script = (
        "import pickle, sys; from tests.retrieval.rows import make_rows; "
        "store = pickle.loads(bytes.fromhex(sys.argv[1])); print(*store.write_fragments(make_rows(0, 7)), sep='\\n')"
    )
    command = [sys.executable, "-c", script, pickle.dumps(store).hex()]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    store.commit(output.splitlines(), store.version)
    assert store.dataset().to_table().equals(make_rows(0, 7))


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
