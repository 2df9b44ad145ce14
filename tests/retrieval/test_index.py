import json
from dataclasses import asdict, replace
from pathlib import Path

import lancedb
import numpy as np
import pytest
from pydantic import ValidationError

from imagerag.retrieval import index
from imagerag.retrieval.ann import IndexRecord, nearest, read_record
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.recall import make_probes, to_numpy
from imagerag.retrieval.schema import EncoderIdentity
from imagerag.retrieval.search import Filters, Retriever
from imagerag.retrieval.store import Store
from imagerag.storage.lance_table import literal, rows_with
from tests.retrieval.rows import ENCODER, append, embeddings, fixed_size_lists, make_rows, unit

LOOKED_UP = ("id", "url", "image_sha256", "source", "licence")
LARGE = EncoderIdentity(id="encoder-64", digest="c" * 64, dim=64)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """20,000 rows of 64 dimensions, indexed."""
    store = Store(str(tmp_path_factory.mktemp("large")), "large")
    store.open_or_create(LARGE)
    append(store, make_rows(0, 20_000, LARGE, image=[b"the same image"] * 20_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagerag.retrieval.index._NUM_QUERIES", 100)
        build_index(store, IndexConfig())
    return store


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement of recall is most of a build's time, which only `large` needs to be precise."""
    monkeypatch.setattr("imagerag.retrieval.index._NUM_QUERIES", 20)


def search_indexes(store: Store) -> dict[str, tuple[int, int]]:
    return {column: found for column, found in indexes(store).items() if column not in LOOKED_UP}


def indexes(store: Store) -> dict[str, tuple[int, int]]:
    """Column to rows indexed and number of segments."""
    table = lancedb.connect(store.uri).open_table(store.name)
    statistics = {index.columns[0]: table.index_stats(index.name) for index in table.list_indices()}
    return {column: (found.num_indexed_rows, found.num_indices) for column, found in statistics.items()}


def plan(store: Store, condition: str) -> str:
    found: str = store.dataset().scanner(columns=["caption"], filter=condition).explain_plan()
    return found


def test_rows_are_looked_up_by_an_index(large: Store) -> None:
    for column in LOOKED_UP:
        value = literal(large.dataset().take([0], columns=[column])[column][0].as_py())
        assert f"{column}_idx" in plan(large, f"{column} = {value}")
    assert "ScalarIndexQuery" not in plan(large, "caption = 'x'"), "the plan must be able to say no"
    assert "ScalarIndexQuery" in plan(large, Filters(source="even", licence="CC0-1.0").to_sql() or "")


def test_new_rows_are_looked_up_by_an_index(tmp_path: Path) -> None:
    store, config = Store(str(tmp_path), "images"), IndexConfig(exact_below=1_000)
    store.open_or_create(ENCODER)
    for stop, num_segments, of_vectors in ((2_000, 1, 1), (2_015, 2, 2), (2_100, 2, 1)):
        append(store, make_rows(store.count(), stop))
        build_index(store, config)
        assert {indexes(store)[column] for column in LOOKED_UP} == {(stop, num_segments)}
        assert indexes(store)["text_embed"] == (stop, of_vectors)
        last = make_rows(stop - 1, stop)
        for column in ("id", "url", "image_sha256"):
            found = rows_with(store.dataset(), column, last[column], ["caption"])
            assert found["caption"].to_pylist() == [f"picture number {stop - 1}"]
    assert store.delete(make_rows(2_014, 2_016)["id"]) == 2
    assert rows_with(store.dataset(), "id", make_rows(2_014, 2_016)["id"], ["id"]).num_rows == 0


def test_a_table_of_before_gets_the_indexes(large: Store) -> None:
    for column in LOOKED_UP:
        large.dataset().drop_index(f"{column}_idx")
    assert "ScalarIndexQuery" not in plan(large, f"id = {literal(bytes(20))}")
    build_index(large, IndexConfig())
    assert "ScalarIndexQuery" in plan(large, f"id = {literal(bytes(20))}")


@pytest.mark.parametrize("number", [0, 1, 1_000, 1_001])
def test_few_and_many_values_are_looked_up(large: Store, number: int) -> None:
    rows = make_rows(5, 5 + number, LARGE, image=[b"the same image"] * number)
    found = rows_with(large.dataset(), "id", rows["id"], ["url", "id"])
    assert found.column_names == ["url", "id"]
    assert set(found["id"].to_pylist()) == set(rows["id"].to_pylist())


def test_a_small_table_is_searched_exactly(store: Store) -> None:
    append(store, make_rows(0, 50))
    result = build_index(store, IndexConfig())
    assert (result.kind, result.recall_at_10, result.num_rows) == ("exact", 1.0, 50)
    assert result.version == store.version
    assert search_indexes(store) == {"caption": (50, 1)}


def test_an_unchanged_table_is_not_indexed_again(store: Store) -> None:
    append(store, make_rows(0, 50))
    first, notes = build_index(store, IndexConfig()), []
    again = build_index(store, IndexConfig(), lambda done, total, note="": notes.append((done, total, note)))
    assert again.version == first.version == store.version
    assert notes == [(4, 4, "unchanged")]


def test_another_config_builds_again(store: Store) -> None:
    append(store, make_rows(0, 1_200))
    assert build_index(store, IndexConfig()).kind == "exact"
    result = build_index(store, IndexConfig(exact_below=1_000))
    assert (result.kind, result.version) == ("IVF_SQ", store.version)


def test_an_empty_table_can_be_indexed(store: Store) -> None:
    assert build_index(store, IndexConfig()).num_rows == 0
    append(store, make_rows(0, 10))
    assert build_index(store, IndexConfig()).num_rows == 10


def test_a_large_table_gets_an_index_for_each_embedding(large: Store) -> None:
    record = read_record(large.dataset())
    assert record is not None
    assert (record.kind, record.num_rows, record.num_unindexed_rows) == ("IVF_SQ", 20_000, 0)
    assert record.version == large.version
    assert 0.98 <= record.recall_at_10 <= 1.0
    for levels in record.nprobes.values():
        assert levels["10"] <= levels["100"] <= levels["1000"] <= 141
        assert levels["10"] < 141, "the index would be of no use"
    assert search_indexes(large) == dict.fromkeys(["caption", "text_embed", "image_embed"], (20_000, 1))


@pytest.mark.parametrize("column", ["text_embed", "image_embed"])
def test_measured_recall_holds_for_queries_that_are_no_rows(large: Store, column: str) -> None:
    queries = embeddings(50_000, 50_100, 64, salt=column == "image_embed")
    rows = np.stack(large.dataset().to_table(columns=[column])[column].to_numpy())
    ids = large.ids().to_numpy(zero_copy_only=False)
    record = read_record(large.dataset())
    assert record is not None
    found = nearest(large.dataset(), column, queries, 10, ["id"], record.probes(column, 10))
    exact = ids[np.argsort(-queries @ rows.T, axis=1)[:, :10]]
    hits = sum(len(set(found["id"].to_pylist()[i * 10 : i * 10 + 10]) & set(exact[i])) for i in range(100))
    assert hits / 1_000 >= 0.95
    assert found["_distance"].to_numpy()[::10] == pytest.approx(1 - np.max(queries @ rows.T, axis=1), abs=1e-5)


def test_a_narrow_filter_finds_all_its_rows(large: Store) -> None:
    where = "caption LIKE 'picture number %777'"
    found = nearest(large.dataset(), "text_embed", embeddings(0, 1, 64), 30, ["id"], nprobes=1, where=where)
    assert found.num_rows == 20


@pytest.mark.parametrize("where", [None, "source = 'even'"])
def test_a_search_that_looks_for_no_unindexed_rows_finds_the_same(large: Store, where: str | None) -> None:
    dataset, queries = large.dataset(), embeddings(20_000, 20_020, 64)
    usual, quick = (
        nearest(dataset, "text_embed", queries, 10, ["id"], 8, where, is_indexed=is_indexed)
        for is_indexed in (False, True)
    )
    assert quick.num_rows == 200
    assert quick.equals(usual)


def test_recall_is_low_where_a_search_looks_into_too_little(large: Store) -> None:
    """The measure must be able to say no."""
    probes = make_probes(large.dataset(), 100)
    low, high = (min(probe.recall(large.dataset(), 10, nprobes) for probe in probes) for nprobes in (1, 141))
    assert low < 0.9
    assert high > 0.99


def test_more_neighbours_and_narrower_filters_are_looked_for_in_more(large: Store) -> None:
    dataset, record = large.dataset(), read_record(large.dataset())
    assert record is not None
    assert list(record.recalls)[:4] == ["recall@1", "recall@4", "recall@10", "recall@100"]
    assert record.recalls["recall@10"] == record.recall_at_10
    assert min(record.recalls.values()) >= 0.95, record.recalls
    probes = make_probes(dataset, 100)
    as_for_ten = min(probe.recall(dataset, 1_000, record.probes(probe.column, 10)) for probe in probes)
    as_it_is = min(probe.recall(dataset, 1_000, record.probes(probe.column, 1_000)) for probe in probes)
    assert as_for_ten < 0.9 <= as_it_is
    others = [probe for probe in probes if not probe.is_own]
    assert 0 < others[0].share < 0.1
    assert min(probe.recall(dataset, 10, 1, probe.where) for probe in others) < 0.9, (
        "the measure must be able to say no"
    )
    searched = replace(record, config={"exact_below": 0})  # not exactly, although so few rows meet the condition
    numbers = {probe.column: searched.probes(probe.column, 10, probe.share) for probe in others}
    assert min(probe.recall(dataset, 10, numbers[probe.column], probe.where) for probe in others) >= 0.99


def test_probes_follow_the_neighbours_and_the_share_of_rows() -> None:
    record = IndexRecord(
        version=1, kind="IVF_SQ", num_rows=10_000, num_trained_rows=10_000, recall_at_10=1.0, num_unindexed_rows=0,
        nprobes={"text_embed": {"10": 10, "100": 20, "1000": 80}}, config={"exact_below": 1_000},
    )  # fmt: skip
    assert record.probes("image_embed", 10) is None
    assert [record.probes("text_embed", k) for k in (1, 10, 32, 100, 1_000)] == [10, 10, 15, 20, 80]
    assert 20 < (with_margin := record.probes("text_embed", 10, share=0.1)) < 80
    assert with_margin == record.probes("text_embed", 174), "not all of the nearest have a rank below the mean"
    assert record.probes("text_embed", 100, share=0.1) == 100, "all of them"
    assert record.probes("text_embed", 10, share=0.099) is None, "so few are searched exactly"
    assert record.probes("text_embed", 10, share=0.0) is None


def test_a_record_of_before_is_read_and_completed(tmp_path: Path) -> None:
    store, config = Store(str(tmp_path), "images"), IndexConfig(exact_below=1_000)
    store.open_or_create(ENCODER)
    append(store, make_rows(0, 1_500))
    build_index(store, config)
    record = read_record(store.dataset())
    assert record is not None
    former = asdict(record) | {"version": store.version + 1, "nprobes": {"text_embed": 7, "image_embed": 8}}
    del former["recalls"]
    store.dataset().update_config({"imagerag.index": json.dumps(former)})
    read = read_record(store.dataset())
    assert read is not None
    assert (read.probes("text_embed", 10), read.probes("image_embed", 4)) == (7, 8)
    assert read.probes("text_embed", 11) == 38, "all partitions, as nothing is known"
    build_index(store, config)
    completed = read_record(store.dataset())
    assert completed is not None
    assert completed.recalls.keys() == record.recalls.keys()


def test_more_is_looked_into_where_neighbours_are_spread(tmp_path: Path) -> None:
    """Vectors without any structure are the worst case of an index by partitions."""
    store = Store(str(tmp_path), "images")
    store.open_or_create(LARGE)
    vectors = unit(np.random.default_rng(0).standard_normal((5_000, 64)))
    column = fixed_size_lists(vectors)
    append(store, make_rows(0, 5_000, LARGE, text_embed=column, image_embed=column))
    result = build_index(store, IndexConfig())
    record = read_record(store.dataset())
    assert record is not None
    assert min(levels["10"] for levels in record.nprobes.values()) > 20
    assert result.recall_at_10 >= 0.95


def test_new_rows_join_the_index(large: Store, capfd: pytest.CaptureFixture[str]) -> None:
    """A few of them in a second segment, which is merged into the first when it has 1 % of the rows."""
    for start, num_segments in ((20_000, 2), (20_100, 2), (20_200, 1), (20_300, 2)):
        rows = make_rows(start, start + 100, LARGE, caption=[f"zebra {number}" for number in range(start, start + 100)])
        append(large, rows)
        result = build_index(large, IndexConfig())
        assert (result.num_rows, result.num_unindexed_rows) == (start + 100, 0)
        found = indexes(large)
        assert {found[column] for column in ("text_embed", "image_embed")} == {(start + 100, num_segments)}
        retriever = Retriever(large.uri, large.name, version=large.version)
        (near,) = retriever.search(to_numpy(rows["text_embed"])[7:8], 1)
        (word,) = retriever.search(None, 1, by="words", texts=[f"zebra {start + 7}"])
        assert (near[0].caption, word[0].caption) == (f"zebra {start + 7}",) * 2
    record = read_record(large.dataset())
    assert record is not None
    assert record.num_trained_rows == 20_000
    assert "is empty" not in capfd.readouterr().err, "Lance would warn of every partition that gets no new row"


def test_words_score_the_same_in_two_segments(store: Store) -> None:
    """Rare words are rare among all rows, not among those of a segment."""
    append(store, make_rows(0, 1_000))
    build_index(store, IndexConfig())
    append(store, make_rows(1_000, 1_005, caption=[f"picture of zebra number {number}" for number in range(5)]))
    found = list[dict[str, float]]()
    for num_segments in (2, 1):
        build_index(store, IndexConfig())
        assert indexes(store) == {"caption": (1_005, num_segments)}
        (rows,) = Retriever(store.uri, store.name, version=store.version).search(
            None, 8, by="words", texts=["zebra picture 17"]
        )
        found.append({row.caption: row.score for row in rows[:6]})  # the others score the same
        store.dataset().drop_index("caption_idx")  # the next one is built in one segment
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1])


def test_small_fragments_are_merged(store: Store) -> None:
    for start in range(0, 50, 10):
        append(store, make_rows(start, start + 10))
    build_index(store, IndexConfig())
    assert len(store.dataset().get_fragments()) == 1
    assert store.count() == 50


def test_partitions_are_trained_anew_when_the_table_has_grown(store: Store) -> None:
    config = IndexConfig(exact_below=1_000)
    for stop, trained in ((1_000, 1_000), (1_500, 1_000), (2_100, 2_100)):
        append(store, make_rows(store.count(), stop))
        build_index(store, config)
        record = read_record(store.dataset())
        assert record is not None
        assert record.num_trained_rows == trained


def test_recall_is_measured_again_when_many_rows_are_new(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    config, measured = IndexConfig(exact_below=1_000), list[int]()
    monkeypatch.setattr(index, "make_probes", lambda dataset, n: measured.append(n) or make_probes(dataset, n))
    for stop, num_new, num_measured in ((1_500, 0, 1), (1_520, 20, 1), (1_530, 30, 1), (1_532, 0, 2), (1_533, 1, 2)):
        append(store, make_rows(store.count(), stop))
        build_index(store, config)
        record = read_record(store.dataset())
        assert record is not None
        assert (record.num_new_rows, len(measured)) == (num_new, num_measured)
        assert record.recalls
        assert search_indexes(store)["text_embed"][0] == stop


def test_the_digest_of_rows_follows_every_change(store: Store) -> None:
    """Whether it is made from that of the version before or from all rows."""
    append(store, make_rows(0, 60))
    build_index(store, IndexConfig())
    first = digest_of(store)
    steps = {
        "added": lambda: append(store, make_rows(60, 70)),
        "deleted": lambda: store.delete(make_rows(5, 8)["id"]),
        "deleted of the same fragment": lambda: store.delete(make_rows(8, 9)["id"]),
        "replaced": lambda: (
            store.delete(make_rows(20, 21)["id"]),
            append(store, make_rows(20, 21, licence=["other"])),
        ),
        "rewritten": lambda: store.compact(deleted_share=0.0),
    }
    digests = [first]
    for change, apply in steps.items():
        apply()
        build_index(store, IndexConfig())
        digests.append(digest_of(store))
        assert digests[-1] == index._digest_of_rows(store.dataset(), None), change
    assert len(set(digests)) == 5, "all steps change the rows except the last"
    store.delete(store.ids())
    append(store, make_rows(0, 60))
    build_index(store, IndexConfig())
    assert digest_of(store) == first


def digest_of(store: Store) -> str:
    record = read_record(store.dataset())
    assert record is not None
    return record.rows


def test_a_table_that_shrank_loses_its_index(store: Store) -> None:
    config = IndexConfig(exact_below=1_000)
    append(store, make_rows(0, 1_100))
    built = build_index(store, config)
    assert built.kind == "IVF_SQ"
    again = build_index(store, IndexConfig())
    assert (again.kind, again.version) == ("IVF_SQ", built.version), "nobody configured anything else"
    store.delete(store.ids()[:200])
    assert build_index(store, config).kind == "exact"
    assert set(search_indexes(store)) == {"caption"}


def test_config_has_bounds() -> None:
    with pytest.raises(ValidationError, match="exact_below"):
        IndexConfig(exact_below=10)
    with pytest.raises(ValidationError, match="target_recall"):
        IndexConfig(target_recall=1.5)
