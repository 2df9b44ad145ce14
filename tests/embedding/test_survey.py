"""What a table lacks of its corpus."""

from pathlib import Path

import pyarrow as pa
import pytest

from imagerag.corpus.corpus import Corpus
from imagerag.corpus.ledger import iter_images
from imagerag.embedding.survey import compare, first_rows, survey, with_ids
from imagerag.retrieval.schema import row_id
from imagerag.retrieval.store import Store
from imagerag.storage import spool
from tests.embedding.shards import sample, want, write_shard
from tests.retrieval.rows import ENCODER, append, make_rows


def table(*rows: tuple[str, str, str | None]) -> pa.Table:
    columns = ("sha256", "url", "source")
    listed = [dict(zip(columns, row, strict=True)) | {"caption": "c", "licence": None} for row in rows]
    strings = [(name, pa.string()) for name in ("sha256", "url", "source", "caption", "licence")]
    return next(spool.numbered([pa.Table.from_pylist(listed, schema=pa.schema(strings))]))


def test_comparing_takes_the_first_and_sees_what_changed() -> None:
    one, two, three = ("1" * 64, "2" * 64, "3" * 64)
    wanted = first_rows(with_ids(table((one, "a", None), (two, "b", "x"), (one, "c", None))))
    assert wanted["url"].to_pylist() == ["a", "b"]
    assert wanted["source"].to_pylist() == ["", "x"]
    present = first_rows(with_ids(table((one, "a", None), (two, "b", None), (three, "d", None))))
    missing, stale = compare(wanted, present.select(["id", "url", "source", "licence"]))
    assert missing.to_pylist() == wanted.slice(1).to_pylist()
    assert set(stale.to_pylist()) == {row_id(two, "c"), row_id(three, "c")}
    missing, stale = compare(wanted, wanted.select(["id", "url", "source", "licence"]))
    assert (missing.num_rows, len(stale)) == (0, 0)


@pytest.mark.parametrize("memory_rows", [spool.MEMORY_ROWS, 5])
def test_a_survey_is_the_same_in_memory_and_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_rows: int
) -> None:
    monkeypatch.setattr(spool, "MEMORY_ROWS", memory_rows)
    samples = [sample(number) for number in range(20)]
    for shard in range(2):
        write_shard(tmp_path / "shards", shard, samples[10 * shard : 10 * shard + 10])
    write_shard(tmp_path / "shards", 2, [sample(30, seed=0, caption="picture 0")])
    want(tmp_path / "shards", [*samples[::-1], sample(30, seed=0, caption="picture 0")])
    store = Store(str(tmp_path / "index"), "images")
    store.open_or_create(ENCODER)
    others = make_rows(0, 7)
    append(store, others)
    found = survey(iter_images(Corpus(str(tmp_path / "shards"))), store)
    assert (found.num_images, found.num_wanted, found.num_missing) == (21, 20, 20)
    assert set(found.stale.to_pylist()) == set(others["id"].to_pylist())
    for _ in range(2):
        first, second = found.shards()
        assert first["caption"].to_pylist() == [f"picture {number}" for number in range(9, -1, -1)]
        assert second["caption"].to_pylist() == [f"picture {number}" for number in range(19, 9, -1)]
        assert set(first["shard"].to_pylist()) == {0}
