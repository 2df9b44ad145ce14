"""Tables, and tables of computed results."""

import threading
from pathlib import Path

import pyarrow as pa
import pytest

from imagerag.errors import UserError
from imagerag.storage.hexadecimal import ID, to_hex
from imagerag.storage.keyed_table import KeyedTable, array_field
from imagerag.storage.lance_table import CommitConflictError, LanceTable, changed_fragments

KEYED_BY = {"model": "a"}
COLUMNS = (array_field("latents", (1, 2)),)


@pytest.fixture
def table(tmp_path: Path) -> LanceTable:
    table = LanceTable(str(tmp_path), "numbers")
    table.append(rows(0, 0))
    return table


@pytest.fixture
def keyed(tmp_path: Path) -> KeyedTable:
    return KeyedTable.of(str(tmp_path), "real", KEYED_BY, COLUMNS)


def rows(start: int, stop: int) -> pa.Table:
    return pa.table({"id": ids(*map(str, range(start, stop)))})


def ids(*names: str) -> pa.Array:
    return pa.array([name.encode().ljust(ID.byte_width) for name in names], ID)


def computed(*names: str) -> pa.Table:
    return pa.table({"id": ids(*names), "latents": [[1.0, 2.0]] * len(names), "more": [0] * len(names)})


def data_files(table: LanceTable) -> set[Path]:
    return set(Path(table.table_uri, "data").iterdir())


def test_a_missing_table_or_version_is_reported(table: LanceTable) -> None:
    missing = LanceTable(table.uri, "none")
    assert table.exists
    assert table.has(1)
    assert not any([missing.exists, missing.has(1), table.has(9)])
    for open_it in (missing.dataset, lambda: table.dataset(9)):
        with pytest.raises(UserError, match="there is no table"):
            open_it()


def test_nothing_is_visible_before_the_commit(table: LanceTable) -> None:
    version = table.version
    fragments = [fragment for i in range(3) for fragment in table.write_fragments(rows(i * 5, i * 5 + 5))]
    assert (table.version, table.count()) == (version, 0)
    assert table.commit(fragments, version) == table.version == version + 1
    assert table.count() == 15


def test_a_commit_without_fragments_changes_nothing(table: LanceTable) -> None:
    version = table.version
    assert table.commit([], version) == version == table.version


def test_a_commit_on_an_outdated_read_is_refused(table: LanceTable) -> None:
    read_version = table.version
    fragments = table.write_fragments(rows(0, 5))
    table.append(rows(5, 8))
    with pytest.raises(CommitConflictError, match=f"read at version {read_version} and is now at {read_version + 1}"):
        table.commit(fragments, read_version)
    assert table.count() == 3


def test_fragments_grow_with_the_table_a_part_at_a_time(table: LanceTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagerag.storage.lance_table._FRAGMENT_ROWS", 8)
    monkeypatch.setattr("imagerag.storage.lance_table._MOST_FRAGMENTS", 4)
    for start in range(0, 128, 8):
        table.append(rows(start, start + 8))
    table.append(rows(128, 130))
    table.append(rows(130, 132))
    sizes = []
    for _ in range(12):
        table.compact(deleted_share=0.1)
        sizes.append([fragment.count_rows() for fragment in table.dataset().get_fragments()])
    assert (max(sizes[0]), sizes[0].count(8)) == (64, 8), "one fragment at a time"
    assert max(map(max, sizes)) < 2 * 64
    assert len(sizes[-1]) <= 4
    assert sizes[-1] == sizes[-2], "what is large is left alone"
    assert table.dataset().to_table(columns=["id"]).equals(rows(0, 132))


def test_changed_fragments_are_those_with_other_rows(table: LanceTable) -> None:
    table.append(rows(0, 10))
    table.append(rows(10, 20))
    before = table.dataset()
    table.delete(ids("3"))
    table.append(rows(20, 25))
    table.dataset().add_columns({"more": "1"})  # which writes a further file for each fragment
    after = table.dataset()
    old, new = changed_fragments(before, after)
    assert [fragment.count_rows() for fragment in old] == [10]
    assert [fragment.count_rows() for fragment in new] == [9, 5]
    assert changed_fragments(after, after) == ([], [])
    table.delete(ids("4"))
    old, new = changed_fragments(after, table.dataset())
    assert [(fragment.count_rows(), len(new)) for fragment in old] == [(9, 1)]


def test_of_two_commits_at_once_one_wins(table: LanceTable) -> None:
    """Without the lock, as on an object store: both pass the first check, and Lance would accept both."""
    read_version = table.version
    writes = [table.write_fragments(rows(0, 5)), table.write_fragments(rows(0, 5))]
    barrier, outcomes = threading.Barrier(2), []

    def commit(fragments: list[str]) -> None:
        barrier.wait()
        try:
            table.commit(fragments, read_version)
            outcomes.append("committed")
        except CommitConflictError:
            outcomes.append("conflict")

    threads = [threading.Thread(target=commit, args=(fragments,)) for fragments in writes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["committed", "conflict"]
    assert sorted(table.ids().to_pylist()) == sorted(rows(0, 5)["id"].to_pylist())


def test_delete(table: LanceTable) -> None:
    table.append(rows(0, 10))
    assert table.delete(rows(0, 4)["id"]) == 4
    assert table.ids().to_pylist() == rows(4, 10)["id"].to_pylist()


def test_rows_that_are_there_twice_are_both_deleted(table: LanceTable) -> None:
    table.append(rows(0, 3))
    table.append(rows(0, 1))
    assert table.delete(rows(0, 1)["id"]) == 2
    assert table.count() == 2


def test_deleting_what_is_not_there_changes_nothing(table: LanceTable) -> None:
    table.append(rows(0, 3))
    version = table.version
    assert table.delete(ids("absent", "it's absent")) == 0
    assert (table.version, table.count()) == (version, 3)


def test_many_rows_are_deleted_at_once(table: LanceTable) -> None:
    table.append(rows(0, 100))
    version = table.version
    absent = [f"{i:040x}" for i in range(100_000)]
    assert table.delete(absent + to_hex(rows(0, 50)["id"])) == 50
    assert table.version == version + 1


def test_a_keyed_table_is_made_when_it_is_opened(keyed: KeyedTable) -> None:
    with pytest.raises(UserError, match=r"real-\w{16}\.lance is gone: make it again"):
        KeyedTable.at(keyed.table_uri)
    assert keyed.count() == 0
    assert KeyedTable.at(keyed.table_uri) == keyed
    assert keyed == KeyedTable.of(keyed.uri, "real", KEYED_BY, COLUMNS)
    assert keyed.digest != KeyedTable.of(keyed.uri, "real", {"model": "b"}, COLUMNS).digest


def test_computed_rows_are_committed_with_the_tables_columns(keyed: KeyedTable) -> None:
    version = keyed.version
    assert keyed.commit(keyed.write_fragments(computed("a", "b")), version) == version + 1
    assert keyed.dataset().schema == keyed.schema
    assert keyed.dataset().to_table().to_pylist() == [
        {"id": id, "latents": [1.0, 2.0]} for id in ids("a", "b").to_pylist()
    ]


def test_what_is_dropped_is_in_no_file(keyed: KeyedTable) -> None:
    for names in ("ab", "cd"):
        keyed.commit(keyed.write_fragments(computed(*names)), keyed.version)
    untouched, left_over = data_files(keyed), keyed.write_fragments(computed("e"))
    assert left_over
    keyed.keep(pa.chunked_array([ids("a", "c", "d")]))
    assert keyed.ids().combine_chunks() == ids("a", "c", "d")
    assert not [version for version in range(1, keyed.version) if keyed.has(version)]
    assert len(data_files(keyed) - untouched) == len(data_files(keyed)) == 1
    assert keyed.drop(pa.chunked_array([ids("e")])) == 0


@pytest.mark.parametrize("killed", ["after the deletion", "after the compaction"])
def test_what_a_killed_drop_left_is_dropped(keyed: KeyedTable, killed: str) -> None:
    keyed.commit(keyed.write_fragments(computed("a", "b")), keyed.version)
    before = data_files(keyed)
    keyed.delete(ids("a"))
    if killed == "after the compaction":
        keyed.compact(deleted_share=0.0)
    assert data_files(keyed) >= before
    assert keyed.drop(pa.chunked_array([ids("a")])) == 0, "it is deleted already, though not from the files"
    assert keyed.ids().combine_chunks() == ids("b")
    assert not data_files(keyed) & before
