"""What a driver holds of a table of many rows."""

import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from imagerag.embedding.survey import survey
from imagerag.retrieval import index
from imagerag.retrieval.blocklist import block
from imagerag.retrieval.checks import check_rows
from imagerag.retrieval.schema import row_ids, row_schema
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import reachable_rows
from imagerag.storage.hexadecimal import SHA256, from_hex, to_hex
from tests.retrieval.rows import DIM, ENCODER, append, fixed_size_lists

NUM_ROWS = 200_000
MOST_ROWS = 20_000
"""That a driver may have in one table of what it read, or as Python's objects."""
_BYTES = 64
"""Of a Python string, at least."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("large")), "large")
    store.open_or_create(ENCODER)
    append(store, rows())
    return store


def rows() -> pa.Table:
    hashes = pa.array([f"{number:064x}" for number in range(NUM_ROWS)])
    vectors = np.zeros((NUM_ROWS, DIM), np.float32)
    vectors[:, 0] = 1
    same = {"source": "here", "licence": "CC0-1.0", "caption": "one", "width": 4, "height": 4, "image": b"an image"}
    columns = {
        "id": row_ids(hashes, pa.repeat("one", NUM_ROWS)),
        "image_sha256": from_hex(hashes.to_pylist(), SHA256),
        "url": pa.array([f"https://example.org/{number}" for number in range(NUM_ROWS)]),
        "text_embed": fixed_size_lists(vectors),
        "image_embed": fixed_size_lists(vectors),
        **{name: pa.repeat(value, NUM_ROWS) for name, value in same.items()},
    }
    return pa.table(columns).select(row_schema(ENCODER).names).cast(row_schema(ENCODER))


@cache
def images() -> pa.Table:
    """What the corpus has: the same, but for the last row."""
    kept = rows().slice(0, NUM_ROWS - 1)
    hashes = pa.array(to_hex(kept["image_sha256"]))
    kept = kept.select(["url", "caption", "source", "licence"]).append_column("sha256", hashes)
    return kept.append_column("row", pa.array(np.arange(len(kept)))).append_column(
        "shard", pa.array(np.arange(len(kept)))
    )


def survey_of(store: Store) -> None:
    found = survey([images()], store)
    assert (found.num_missing, len(found.stale), found.num_wanted) == (0, 1, NUM_ROWS - 1)


def check(store: Store) -> None:
    assert all(each.passed for each in check_rows(store, store.dataset()))


def digest(store: Store) -> None:
    assert len(index._digest_of_rows(store.dataset(), None)) == 64


def look_up(store: Store) -> None:
    block(store, "url", ["https://example.org/gone"])
    found = reachable_rows(store, {"url": ["https://example.org/7"], "image_sha256": [f"{8:064x}"]})
    assert len(found) == 2


def look_up_many(store: Store) -> None:
    assert len(reachable_rows(store, {"url": [f"https://example.org/{number}" for number in range(1_500)]})) == 1_500


@pytest.mark.parametrize("stage", [survey_of, check, digest, look_up, look_up_many], ids=lambda stage: stage.__name__)
def test_a_driver_holds_few_rows(large: Store, stage: Callable[[Store], None], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    to_table = lance.LanceDataset.to_table

    def counting(dataset: lance.LanceDataset, *arguments: object, **named: object) -> pa.Table:
        table = to_table(dataset, *arguments, **named)
        read.append(table.num_rows)
        return table

    monkeypatch.setattr(lance.LanceDataset, "to_table", counting)
    images()  # which is not what is measured
    tracemalloc.start()
    try:
        stage(large)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(read, default=0) <= MOST_ROWS
    assert most < MOST_ROWS * _BYTES * 4, f"{most} bytes of Python's objects"


def test_a_digest_tells_rows_and_not_their_order(tmp_path: Path) -> None:
    def digest_of(name: str, *parts: pa.Table) -> str:
        store = Store(str(tmp_path), name)
        store.open_or_create(ENCODER)
        for part in parts:
            append(store, part)
        return index._digest_of_rows(store.dataset(), None)

    some = rows().slice(0, 50)
    first = digest_of("a", some)
    assert first == digest_of("b", some.slice(20), some.slice(0, 20))
    url = pa.array(["https://example.org/other", *some["url"].to_pylist()[1:]])
    assert first != digest_of("c", some.set_column(some.column_names.index("url"), some.schema.field("url"), url))
    assert first != digest_of("d", some.slice(1))
