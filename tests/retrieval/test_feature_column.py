"""Cached features as a column of the table."""

import json
from dataclasses import asdict

import numpy as np
import psutil
import pyarrow as pa
import pytest
from lance import LanceDataset

from imagerag.errors import UserError
from imagerag.retrieval import feature_column
from imagerag.retrieval.publish import status
from imagerag.retrieval.schema import FEATURE_KEY, FeatureIdentity, Features
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import remove_rows
from imagerag.storage.hexadecimal import to_hex
from imagerag.storage.lance_table import CommitConflictError, changed_fragments
from tests.retrieval.rows import append, embeddings, index_and_publish, make_rows

SHAPE = (3, 2, 2)
MINE = FeatureIdentity(base="base-a", digest="a" * 64, fit="auto", shape=SHAPE)
OTHER = FeatureIdentity(base="base-b", digest="b" * 64, fit="auto", shape=SHAPE)


def compute(images: list[bytes], captions: list[str]) -> Features:
    """Features that a row's own content tells."""
    numbers = [int(caption.rsplit(" ", 1)[1]) for caption in captions]
    return np.stack([np.full(SHAPE, number / 8, np.float16) for number in numbers])


def fill_all(store: Store, identity: FeatureIdentity = MINE, batch_size: int = 7) -> list[int]:
    """Do what the job does, and return how many rows each fragment lacked."""
    with store.writer_lock():
        version = feature_column.prepare(store, identity)
        missing = feature_column.missing(store.dataset(version), identity)
        for fragment in missing:
            feature_column.commit(
                store, [feature_column.fill(store, identity, version, fragment, compute, batch_size)], version
            )
    return list(missing.values())


def cached(store: Store, identity: FeatureIdentity = MINE) -> dict[str, Features | None]:
    table = store.dataset().to_table(columns=["caption", identity.column])
    return dict(
        zip(table["caption"].to_pylist(), feature_column.to_features(table[identity.column], identity), strict=True)
    )


def assert_right(store: Store, identity: FeatureIdentity = MINE) -> None:
    for caption, own in cached(store, identity).items():
        assert own is not None, caption
        assert np.array_equal(own, compute([b""], [caption])[0]), caption


def test_every_row_gets_its_own(store: Store) -> None:
    append(store, make_rows(0, 20))
    append(store, make_rows(20, 30))
    before = store.dataset()
    assert fill_all(store) == [20, 10]
    assert_right(store)
    assert changed_fragments(before, store.dataset()) == ([], []), "the rows are the same"


def test_only_what_is_missing_is_computed(store: Store) -> None:
    append(store, make_rows(0, 20))
    fill_all(store)
    version = store.version
    assert fill_all(store) == []
    assert store.version == version
    append(store, make_rows(20, 25))
    assert fill_all(store) == [5]
    assert_right(store)


def test_a_fragment_that_has_some_is_completed(store: Store) -> None:
    append(store, make_rows(0, 20))
    fill_all(store)
    append(store, make_rows(20, 25))
    store.delete(make_rows(3, 4)["id"].combine_chunks())
    index_and_publish(store)  # merges the fragments
    assert len(store.dataset().get_fragments()) == 1
    assert fill_all(store) == [5]
    assert len(cached(store)) == 24
    assert_right(store)


def test_two_base_models_lie_beside_each_other(store: Store) -> None:
    append(store, make_rows(0, 10))
    fill_all(store)
    assert fill_all(store, OTHER) == [10]
    assert feature_column.cached_features(store.dataset().schema) == [MINE, OTHER]
    assert_right(store)
    assert_right(store, OTHER)


def test_superseded_features_are_gone_from_the_newest_version_alone(store: Store) -> None:
    append(store, make_rows(0, 10))
    fill_all(store)
    fill_all(store, OTHER)
    index_and_publish(store)
    before = store.version
    cropped = FeatureIdentity(base="base-a", digest="c" * 64, fit="crop", shape=SHAPE)
    with store.writer_lock():
        version = feature_column.prepare(store, cropped, [MINE])
    assert feature_column.cached_features(store.dataset(version).schema) == [OTHER, cropped]
    assert feature_column.cached_features(store.dataset(before).schema) == [MINE, OTHER]
    assert fill_all(store, cropped) == [10]
    assert_right(store, cropped)
    assert_right(store, OTHER)


def test_columns_from_before_there_was_a_choice_are_cropped_ones(store: Store) -> None:
    append(store, make_rows(0, 10))
    old = FeatureIdentity(base="base-a", digest="0" * 64, fit="crop", shape=SHAPE)
    about = {name: value for name, value in asdict(old).items() if name != "fit"}
    column = pa.field(old.column, old.to_field().type, metadata={FEATURE_KEY: json.dumps(about).encode()})
    store.dataset().add_columns(pa.schema([column]))
    assert feature_column.cached_features(store.dataset().schema) == [old]
    index_and_publish(store)
    with pytest.raises(UserError, match=r"base-a \(fit crop, .* none for base-a \(fit auto, .*`imagerag features`"):
        Retriever(store.uri, store.name).search(embeddings(0, 1, 16), 4, features=MINE)


def test_what_was_written_is_not_seen_before_the_commit(store: Store) -> None:
    append(store, make_rows(0, 10))
    version = feature_column.prepare(store, MINE)
    filled = feature_column.fill(store, MINE, version, 0, compute, 4)
    assert set(map(type, cached(store).values())) == {type(None)}
    feature_column.commit(store, [filled], version)
    assert_right(store)


@pytest.mark.parametrize("publish", [False, True])  # which also deletes the version that was read
def test_a_fragment_that_another_writer_changed_is_not_overwritten(store: Store, publish: bool) -> None:
    append(store, make_rows(0, 10))
    version = feature_column.prepare(store, MINE)
    filled = feature_column.fill(store, MINE, version, 0, compute, 4)
    append(store, make_rows(10, 12))
    store.compact(deleted_share=0.0)
    if publish:
        index_and_publish(store)
    with pytest.raises(CommitConflictError):
        feature_column.commit(store, [filled], version)
    assert len(cached(store)) == 12


def test_an_indexed_version_states_how_many_rows_lack_features(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    append(store, make_rows(0, 10))
    fill_all(store)
    append(store, make_rows(10, 12))
    index_and_publish(store)

    def count_rows(dataset: LanceDataset, filter: str | None = None) -> int:
        assert filter is None, "counting by a condition reads a column of all rows"
        return sum(fragment.count_rows() for fragment in dataset.get_fragments())

    with monkeypatch.context() as patched:
        patched.setattr(LanceDataset, "count_rows", count_rows)
        assert [each.num_rows for each in status(store).features] == [10]
        assert feature_column.count_lacking(store.dataset(), MINE) == 2
        assert feature_column.count_lacking(store.dataset(), OTHER) == 12
    assert fill_all(store) == [2]
    assert feature_column.count_lacking(store.dataset(), MINE) == 0
    assert [each.num_rows for each in status(store).features] == [10]
    index_and_publish(store)
    assert [each.num_rows for each in status(store).features] == [12]


def test_fragments_are_committed_together(store: Store) -> None:
    for start in range(0, 30, 10):
        append(store, make_rows(start, start + 10))
    version = feature_column.prepare(store, MINE)
    fragments = feature_column.missing(store.dataset(version), MINE)
    filled = [feature_column.fill(store, MINE, version, fragment, compute, 7) for fragment in fragments]
    assert len(filled) == 3
    assert feature_column.commit(store, filled, version) == store.version == version + 1
    assert_right(store)


LARGE = FeatureIdentity(base="base-a", digest="d" * 64, fit="auto", shape=(64, 8, 8))


def fill_large(store: Store) -> int:
    """Fill a column but for ten rows, and return its bytes."""
    append(store, make_rows(0, 500))
    with store.writer_lock():
        version = feature_column.prepare(store, LARGE)
        zeros = np.zeros((500, *LARGE.shape), np.float16)
        filled = feature_column.fill(store, LARGE, version, 0, lambda images, captions: zeros[: len(images)], 500)
        feature_column.commit(store, [filled], version)
    append(store, make_rows(500, 510))
    return zeros.nbytes


def count_everywhere(store: Store) -> list[int]:
    """Rows without features, as each who asks for them is told."""
    (entry,) = status(store).features
    retriever = Retriever(store.uri, store.name)
    lacking = feature_column.missing(store.dataset(), LARGE)
    return [510 - entry.num_rows, retriever.count_without(LARGE), sum(lacking.values())]


def test_counting_reads_no_features(store: Store) -> None:
    num_bytes = fill_large(store)
    index_and_publish(store)
    before = psutil.Process().io_counters().read_chars
    assert count_everywhere(store) == [10, 10, 10]
    read = psutil.Process().io_counters().read_chars - before
    assert read < num_bytes / 8, f"{read} bytes were read to count in {num_bytes}"


def test_a_table_without_the_booleans_is_counted_and_gets_them(store: Store) -> None:
    fill_large(store)
    index_and_publish(store)
    store.dataset().drop_columns([LARGE.presence])
    index_and_publish(store)
    assert count_everywhere(store) == [10, 10, 10]
    with store.writer_lock():
        version = feature_column.prepare(store, LARGE)
    assert LARGE.presence in store.dataset(version).schema.names
    assert feature_column.missing(store.dataset(version), LARGE) == {store.dataset().get_fragments()[0].fragment_id: 10}
    with store.writer_lock():
        assert feature_column.prepare(store, LARGE, [LARGE]) > version
    assert feature_column.missing(store.dataset(), LARGE) == {store.dataset().get_fragments()[0].fragment_id: 510}


def test_search_fetches_features(store: Store) -> None:
    append(store, make_rows(0, 50))
    fill_all(store)
    index_and_publish(store)
    retriever = Retriever(store.uri, store.name)
    queries, texts = embeddings(0, 3, 16), ["picture number 0", "picture number 1", "picture number 2"]
    for by in ("caption", "image", "words", "hybrid"):
        for own in retriever.search(queries, 4, by=by, texts=texts, features=MINE):
            assert len(own) == 4
            for row in own:
                assert row.features is not None
                assert np.array_equal(row.features, compute([b""], [row.caption])[0])
                if by in ("caption", "hybrid"):
                    assert row.similarity is not None
    (first,) = retriever.search(queries[:1], 4, by="hybrid", texts=texts[:1])
    assert first[0].similarity == pytest.approx(1, abs=1e-5)


def test_rows_are_fetched_by_id(store: Store) -> None:
    append(store, make_rows(0, 50))
    fill_all(store)
    index_and_publish(store)
    ids = to_hex(make_rows(0, 50)["id"])
    retriever = Retriever(store.uri, store.name)
    found = retriever.fetch([ids[7], ids[3]], embeddings(7, 8, 16)[0], features=MINE, images=True)
    assert [row.caption for row in found] == ["picture number 7", "picture number 3"]
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    assert found[1].features is not None
    assert found[1].features.max() == 3 / 8
    assert found[0].image == make_rows(7, 8)["image"][0].as_py()
    with pytest.raises(UserError, match=f"has no row with the id '{'0' * 40}'"):
        retriever.fetch([ids[0], "0" * 40])
    with pytest.raises(UserError, match='has 40 hexadecimal digits, got "x\'; DROP"'):
        retriever.fetch([ids[0], "x'; DROP"])


def test_features_of_another_base_are_refused(store: Store) -> None:
    append(store, make_rows(0, 10))
    fill_all(store)
    index_and_publish(store)
    mine = rf"base-a \(fit auto, digest {'a' * 64}\)"
    with pytest.raises(UserError, match=rf"features for {mine}, and none for base-b \(fit auto, digest b"):
        Retriever(store.uri, store.name).search(embeddings(0, 1, 16), 4, features=OTHER)


def test_an_index_without_features_says_so(store: Store) -> None:
    append(store, make_rows(0, 10))
    index_and_publish(store)
    with pytest.raises(UserError, match=r"features for no base model, and none for base-a .*`imagerag features`"):
        Retriever(store.uri, store.name).search(embeddings(0, 1, 16), 4, features=MINE)


def test_takedown_takes_the_features_too(store: Store) -> None:
    append(store, make_rows(0, 10))
    fill_all(store)
    index_and_publish(store)
    remove_rows(store, ids=to_hex(make_rows(4, 5)["id"]))
    assert len(cached(store)) == 9
    assert_right(store)
