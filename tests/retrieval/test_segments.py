import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from lance import LanceDataset

from imagerag.retrieval import segments
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.segments import update_segments
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import holds, remove_rows
from imagerag.storage.hexadecimal import to_hex
from imagerag.storage.locks import LockLostError
from tests.retrieval.rows import append, make_rows
from tests.retrieval.test_takedown import index_files_with

PART = 2_060
"""Rows of a fragment that is not merged with others."""
VALUES = ("caption", "id", "url", "image_sha256", "source", "licence")
CONFIG = IndexConfig(exact_below=1_000)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_SEGMENT_ROWS", 2_100)
    monkeypatch.setattr("imagerag.retrieval.index._NUM_QUERIES", 20)  # recall is not what is tested


def segments_of(store: Store, column: str) -> dict[str, int]:
    """UUID to number of fragments."""
    (index,) = (index for index in store.dataset().describe_indices() if index.field_names == [column])
    return {segment.uuid: len(segment.fragment_ids) for segment in index.segments}


@pytest.fixture
def parts(store: Store) -> Store:
    """Four fragments, each with a segment of its own."""
    for start in range(0, 4 * PART, PART):
        append(store, make_rows(start, start + PART))
    build_index(store, CONFIG)
    return store


def test_a_takedown_rewrites_only_the_segments_of_its_rows(parts: Store) -> None:
    before = {column: segments_of(parts, column) for column in VALUES}
    assert {tuple(found.values()) for found in before.values()} == {(1, 1, 1, 1)}
    # A re-indexing deleted a row of the second fragment, whose values stay in its files; the other is of the third.
    deleted, taken = f"https://example.org/{PART}.png", f"https://example.org/{3 * PART - 1}.png"
    parts.delete(parts.dataset().to_table(columns=["id"], filter=f"url = '{deleted}'")["id"])
    build_index(parts, CONFIG)
    assert {column: segments_of(parts, column) for column in VALUES} == before
    rows = make_rows(PART, 3 * PART)
    traces = [bytes(rows["image_sha256"][i].as_py()) for i in (0, -1)]
    assert all(index_files_with(parts, trace) for trace in traces)

    remove_rows(parts, urls=[taken])

    assert not index_files_with(parts, traces[1])
    assert not index_files_with(parts, taken.encode())
    for column in VALUES:
        after = segments_of(parts, column)
        assert len(after.keys() & before[column].keys()) == 3, column
        assert sum(after.values()) == len(parts.dataset().get_fragments()), column
    assert index_files_with(parts, traces[0]), "nobody asked for it"
    assert num_vectors(parts) == parts.count() + 1

    assert remove_rows(parts, urls=[deleted]).num_rows == 0

    assert not index_files_with(parts, traces[0])
    assert not index_files_with(parts, deleted.encode())
    for column in VALUES:
        assert len(segments_of(parts, column).keys() & before[column].keys()) == 2, column


def num_vectors(store: Store) -> int:
    """Number of vectors in the files of an index."""
    (index,) = store.dataset().stats.index_stats("text_embed_idx")["indices"]
    return sum(partition["size"] for partition in index["partitions"])


def test_a_copy_holds_what_is_in_its_files(parts: Store, tmp_path: Path) -> None:
    """A takedown deletes copies with its rows, and no other models."""
    copies = itertools.count()

    def holds_rows(*numbers: int) -> list[bool]:
        """Of a copy as the table is now: whether it holds each of these rows."""
        build_index(parts, CONFIG)
        copy = parts.copy(parts.version, str(tmp_path / f"copy-{next(copies)}"))
        traces = [rows["image_sha256"][0].as_py() for rows in map(row, numbers)]
        there = [bool(index_files_with(copy, trace)) for trace in traces]
        found = [holds(copy.dataset(), row(number)["id"].combine_chunks()) for number in numbers]
        assert all(one or not trace for one, trace in zip(found, there, strict=True)), "files have a row"
        return found

    def row(number: int) -> pa.Table:
        return make_rows(number, number + 1)

    deleted, stranger = PART + 1, 5 * PART
    parts.delete(row(deleted)["id"])
    assert holds_rows(0, deleted, stranger) == [True, True, False]
    remove_rows(parts, urls=[row(deleted)["url"][0].as_py()])
    assert holds_rows(0, deleted, stranger) == [True, False, False]

    gone = 2 * PART + 1
    parts.delete(make_rows(2 * PART, 3 * PART)["id"])
    assert holds_rows(gone, stranger) == [True, True], "indexes do not tell which rows of the fragment they have"
    before = {fragment.fragment_id for fragment in parts.dataset().get_fragments()}
    parts.delete(make_rows(PART + 100, PART + 500)["id"])
    assert not parts.dataset().count_rows("url = '" + row(gone)["url"][0].as_py() + "'")
    # If Lance did not go on to list the fragment where it rewrote another one, nothing would tell of its rows.
    assert holds_rows(gone, stranger) == [True, True]
    assert before != {fragment.fragment_id for fragment in parts.dataset().get_fragments()}, "one was rewritten"
    remove_rows(parts, urls=[row(gone)["url"][0].as_py()])
    assert holds_rows(gone, stranger) == [False, False]
    assert num_vectors(parts) == parts.count()

    # Lance goes on to list the fragment, whose rows are known to be gone now.
    parts.delete(row(0)["id"])
    assert holds_rows(0, stranger) == [True, False]
    remove_rows(parts, urls=[row(5)["url"][0].as_py()])
    assert num_vectors(parts) == parts.count()
    parts.delete(row(PART + 5)["id"])
    remove_rows(parts, urls=[row(3 * PART)["url"][0].as_py()])
    assert num_vectors(parts) == parts.count() + 1, "the deleted row, which nobody asked for"


def test_every_row_is_found_in_segments(parts: Store) -> None:
    retriever = Retriever(parts.uri, parts.name, version=parts.version)
    for number in range(7, 4 * PART, PART):
        row = make_rows(number, number + 1)
        (found,) = retriever.search(None, 1, by="words", texts=[row["caption"][0].as_py()])
        assert found[0].caption == row["caption"][0].as_py()
        assert parts.dataset().count_rows(filter=f"url = '{row['url'][0].as_py()}'") == 1
    (index,) = (each for each in parts.dataset().describe_indices() if each.field_names == ["url"])
    assert index.num_rows_indexed == 4 * PART


def test_updates_leave_few_segments(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a binary counter has digits, and none with more rows than the limit."""
    monkeypatch.setattr(segments, "_SEGMENT_ROWS", 80)
    monkeypatch.setattr(segments, "_MOST_SEGMENTS", 1_000)
    numbers = []
    for step in range(16):
        append(store, make_rows(10 * step, 10 * (step + 1)))
        update_segments(store, "caption", "INVERTED", {}, {})
        numbers.append(sorted(segments_of(store, "caption").values()))
    assert numbers[:7] == [[1], [2], [1, 2], [4], [1, 4], [2, 4], [1, 2, 4]]
    assert numbers[-1] == [8, 8]


def test_segments_of_an_unknown_origin_are_built_again_by_a_takedown(parts: Store) -> None:
    """Those of an earlier release, or of a build that was killed before it wrote its record."""
    before = segments_of(parts, "url")
    digests = update_segments(parts, "url", "BTREE", {}, {}, rewrite=True)
    assert digests.keys() == segments_of(parts, "url").keys()
    assert not digests.keys() & before.keys()
    assert update_segments(parts, "url", "BTREE", {}, digests, rewrite=True) == digests
    assert digests.keys() == segments_of(parts, "url").keys()


def test_a_segment_that_has_rows_of_a_former_fragment_is_built_again_by_a_takedown(
    parts: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows were deleted before, so that no scan finds them, and the segment's file still has their values."""
    monkeypatch.setattr(segments, "_SEGMENT_ROWS", 2 * PART)
    assert set(segments_of(parts, "url").values()) == {1}
    digests = update_segments(parts, "url", "BTREE", {}, {}, rewrite=True)
    assert set(segments_of(parts, "url").values()) == {2}
    url = f"https://example.org/{PART}.png".encode()
    assert parts.delete(to_hex(make_rows(0, 1)["id"])) == 1
    assert update_segments(parts, "url", "BTREE", {}, digests, rewrite=True) == digests
    assert parts.delete(to_hex(make_rows(PART, 2 * PART)["id"])) == PART
    assert index_files_with(parts, url)
    assert len(update_segments(parts, "url", "BTREE", {}, digests, rewrite=True).keys() - digests.keys()) == 1
    parts.clean_up()
    assert not index_files_with(parts, url)


def test_segments_with_other_settings_are_built_again(parts: Store) -> None:
    digests = update_segments(parts, "caption", "INVERTED", {"stem": True}, {}, rewrite=True)
    assert update_segments(parts, "caption", "INVERTED", {"stem": True}, digests, rewrite=True) == digests
    others = update_segments(parts, "caption", "INVERTED", {"stem": False}, digests, rewrite=True)
    assert not others.keys() & digests.keys()
    assert others.keys() == segments_of(parts, "caption").keys()


def test_segments_are_not_committed_by_a_writer_that_lost_its_lock(
    parts: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building them takes minutes on a large table."""
    before, build, is_lost = segments_of(parts, "url"), LanceDataset.create_index_uncommitted, list[bool]()

    def slow(*arguments: Any, **options: Any) -> Any:
        is_lost.append(True)
        return build(*arguments, **options)

    def check() -> None:
        if is_lost:
            raise LockLostError("taken over")

    monkeypatch.setattr(LanceDataset, "create_index_uncommitted", slow)
    monkeypatch.setattr(segments, "check_locks", check)
    with pytest.raises(LockLostError):
        update_segments(parts, "url", "BTREE", {}, {}, rewrite=True)
    assert segments_of(parts, "url") == before
