import random

import numpy as np
import pyarrow as pa
import pytest

from imagerag.storage import spool
from imagerag.storage.spool import Parts, Spool, by_url, distinct


@pytest.fixture(params=[2**18, 100, 7])
def memory_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many rows stay in memory: all of a test's, some, and next to none."""
    monkeypatch.setattr(spool, "MEMORY_ROWS", request.param)
    monkeypatch.setattr(spool, "NUM_PARTS", 8)
    return int(request.param)


def rows_of(seed: int, count: int = 500) -> pa.Table:
    rng = random.Random(seed)
    urls = [f"http://{rng.randrange(60)}.example/龙" for _ in range(count)]
    captions = [rng.choice(["x", "y", "xy"]) for _ in range(count)]
    return pa.table({"url": urls, "caption": captions, "number": range(count)})


def pieces(rows: pa.Table, size: int = 13) -> list[pa.Table]:
    return [rows.slice(start, size) for start in range(0, rows.num_rows, size)]


def test_rows_stay_in_order(memory_rows: int) -> None:
    rows, kept = rows_of(0), Spool(rows_of(0).schema)
    for piece in pieces(rows):
        kept.append(piece)
    assert kept.num_rows == rows.num_rows
    assert kept.table() == kept.table() == rows
    assert Spool(rows.schema).table() == rows.schema.empty_table()


def test_a_digest_tells_any_other_rows(memory_rows: int) -> None:
    rows, other = rows_of(0), rows_of(0).set_column(2, "number", pa.array([*range(499), 0]))
    same, again, different, fewer = (Spool(rows.schema) for _ in range(4))
    for kept, table in ((same, rows), (again, rows), (different, other), (fewer, rows.slice(0, 499))):
        for piece in pieces(table):
            kept.append(piece)
    assert same.digest() == again.digest()
    assert len({each.digest() for each in (same, different, fewer, Spool(rows.schema))}) == 4


@pytest.mark.parametrize("seed", range(5))
def test_the_first_of_each_pair_stays_in_order(memory_rows: int, seed: int) -> None:
    rows = rows_of(seed)
    seen: dict[tuple[str, str], int] = {}
    for row in rows.to_pylist():
        seen.setdefault((row["url"], row["caption"]), row["number"])
    found = pa.concat_tables(distinct(pieces(rows)))
    assert found["number"].to_pylist() == list(seen.values())
    assert found.column_names == rows.column_names
    assert list(distinct([])) == []


def test_all_rows_of_a_url_are_in_one_part(memory_rows: int) -> None:
    rows = rows_of(1)
    parts = Parts(pieces(rows), by_url)
    assert parts.is_spilled is (memory_rows < 500)
    found = list(parts)
    urls = [set(part["url"].to_pylist()) for part in found]
    assert sum(map(len, urls)) == len(set().union(*urls)) == 60
    assert sorted(np.concatenate([part["number"].to_numpy() for part in found])) == list(range(500))
    by_number = [part for number in range(spool.NUM_PARTS) if (part := parts.part(number)) is not None]
    assert sum(map(len, by_number)) == 500
    for part in by_number:
        assert len(set(by_url(part))) <= 1
        assert part["number"].to_pylist() == sorted(part["number"].to_pylist())
