from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from imagerag.artifacts import Check, Publication
from imagerag.errors import UserError
from imagerag.retrieval import checks
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, publish, published_rows, published_version, rollback, status
from imagerag.retrieval.recall import to_numpy
from imagerag.retrieval.schema import Embeds
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from tests.retrieval.rows import DIM, ENCODER, append, embeddings, index_and_publish, make_rows
from tests.retrieval.test_feature_column import OTHER, fill_all


def failed(publication: Publication) -> list[Check]:
    return [check for check in publication.checks if not check.passed]


def broken_embeddings(kind: float) -> list[object]:
    vectors = embeddings(20, 25, DIM)
    vectors[2] = kind
    return list(vectors)


def test_nothing_is_published_at_first(store: Store) -> None:
    state = status(store)
    assert (state.published_version, state.num_rows, state.history) == (None, 0, ())
    assert (state.newest_version, state.encoder, state.unpublished_changes) == (store.version, ENCODER, True)
    assert published_rows(store) == published_rows(Store(store.uri, "absent")) == 0


def test_publish_moves_the_tag(store: Store) -> None:
    append(store, make_rows(0, 20))
    first = index_and_publish(store)
    assert first.published
    assert (first.version, first.previous_version, first.num_rows) == (store.version, None, 20)
    assert [check.name for check in first.checks] == [
        "rows", "unique ids", "embeddings", "takedown", "shrink", "recall@10"
    ]  # fmt: skip
    append(store, make_rows(20, 30))
    second = index_and_publish(store)
    assert (second.previous_version, second.num_rows) == (first.version, 30)
    state = status(store)
    assert (state.published_version, state.kind, state.recall_at_10) == (second.version, "exact", 1.0)
    assert [(entry.version, entry.num_rows) for entry in state.history] == [(second.version, 30), (first.version, 20)]
    assert state.history[0].published_at > state.history[1].published_at
    assert not state.unpublished_changes


def test_publishing_again_changes_nothing(store: Store) -> None:
    append(store, make_rows(0, 20))
    first, before = index_and_publish(store), status(store)
    again = index_and_publish(store)
    assert (again.version, again.previous_version, again.published) == (first.version, first.version, True)
    assert status(store) == before


@pytest.mark.parametrize(
    ("name", "rows", "detail"),
    [
        ("unique ids", make_rows(0, 1), "1 rows repeat another's id"),
        ("embeddings", make_rows(20, 25, text_embed=broken_embeddings(np.nan)), "1 rows have an embedding"),
        ("embeddings", make_rows(20, 25, image_embed=broken_embeddings(0)), "1 rows have an embedding"),
        ("embeddings", make_rows(20, 25, image_embed=broken_embeddings(0.3)), "1 rows have an embedding"),
    ],
    ids=["repeated id", "NaN", "zero", "not normalised"],
)
def test_bad_rows_are_not_published(store: Store, name: str, rows: pa.Table, detail: str) -> None:
    append(store, make_rows(0, 20))
    good = index_and_publish(store)
    append(store, rows)
    refused = index_and_publish(store)
    assert not refused.published
    assert (refused.version, refused.num_rows) == (good.version, 20)
    assert [check.name for check in failed(refused)] == [name]
    assert failed(refused)[0].detail.startswith(detail)
    assert status(store).unpublished_changes


def test_embeddings_that_passed_are_not_read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = list[int]()

    def read(embeddings: pa.FixedSizeListArray) -> Embeds:
        numbers[-1] += len(embeddings)
        return to_numpy(embeddings)

    monkeypatch.setattr(checks, "to_numpy", read)

    def publish_it() -> bool:
        numbers.append(0)
        return index_and_publish(store).published

    append(store, make_rows(0, 2_060))  # too many to be merged with others
    assert publish_it()
    store.delete(make_rows(0, 1)["id"])
    assert publish_it()
    append(store, make_rows(2_060, 2_070))
    assert publish_it()
    append(store, make_rows(2_070, 2_075, text_embed=broken_embeddings(np.nan)))
    assert not publish_it()
    assert not publish_it(), "a version that did not pass is checked again"
    assert numbers == [2 * 2_060, 0, 2 * 10, 2 * 5, 2 * 5]


def test_an_empty_table_is_not_published(store: Store) -> None:
    refused = index_and_publish(store)
    assert (refused.published, refused.version, refused.num_rows) == (False, None, 0)
    assert [check.name for check in failed(refused)] == ["rows"]
    assert published_version(store) is None


def test_a_table_that_shrank_is_not_published(store: Store) -> None:
    append(store, make_rows(0, 20))
    index_and_publish(store)
    store.delete(store.ids()[:11])
    refused = index_and_publish(store)
    assert failed(refused) == [Check(name="shrink", passed=False, detail="9 rows after 20; at most 50% may go")]
    assert index_and_publish(store, PublishConfig(max_shrink=0.6)).num_rows == 9


def test_low_recall_is_not_published(store: Store) -> None:
    append(store, make_rows(0, 20))
    index = replace(build_index(store, IndexConfig()), kind="IVF_SQ", recall_at_10=0.9)
    refused = publish(store, index, PublishConfig())
    assert failed(refused) == [
        Check(name="recall@10", passed=False, detail="0.900 with IVF_SQ; at least 0.95 is wanted")
    ]
    assert publish(store, index, PublishConfig(min_recall=0.9)).published


def test_a_stale_build_does_not_move_readers_back(store: Store) -> None:
    append(store, make_rows(0, 20))
    old = build_index(store, IndexConfig())
    append(store, make_rows(20, 30))
    new = index_and_publish(store)
    stale = publish(store, old, PublishConfig())
    assert [check.name for check in failed(stale)] == ["newer"]
    assert stale.version == published_version(store) == new.version


def test_only_the_last_publications_are_kept(store: Store) -> None:
    versions = []
    for start in range(0, 40, 10):
        append(store, make_rows(start, start + 10))
        versions.append(index_and_publish(store, PublishConfig(keep=2)).version)
    assert [entry.version for entry in status(store).history] == versions[:1:-1]
    with pytest.raises(UserError, match="is gone"):
        store.dataset(versions[0])
    assert [version["version"] for version in store.dataset().versions()] == versions[2:]


def test_publications_that_nobody_configured_keep_what_was_configured_last(store: Store) -> None:
    """As of a nightly job that sets `keep`, and of the features job that its publication starts."""
    versions = list[int | None]()

    def publish_next(config: PublishConfig) -> None:
        append(store, make_rows(10 * len(versions), 10 * len(versions) + 10))
        versions.append(index_and_publish(store, config).version)

    for _ in range(6):
        publish_next(PublishConfig(keep=30, min_recall=0.5))
    publish_next(PublishConfig())
    publish_next(PublishConfig(max_shrink=0.9))
    assert [entry.version for entry in reversed(status(store).history)] == versions
    append(store, make_rows(100, 110))
    index = replace(build_index(store, IndexConfig()), recall_at_10=0.6)
    assert publish(store, index, PublishConfig()).published
    store.delete(store.ids()[:60])
    assert [check.name for check in failed(index_and_publish(store))] == ["shrink"], "permitted once, not for ever"
    publish_next(PublishConfig(keep=2, max_shrink=0.9))
    publish_next(PublishConfig())
    assert [entry.version for entry in reversed(status(store).history)] == versions[-2:]


def test_readers_stay_on_the_tag_while_a_writer_adds(store: Store) -> None:
    append(store, make_rows(0, 20))
    first = index_and_publish(store)
    reader, query = Retriever(store.uri, store.name), embeddings(20, 21, DIM)
    append(store, make_rows(20, 30))
    late_reader = Retriever(store.uri, store.name)
    second = index_and_publish(store)
    for each in (reader, late_reader):
        assert (each.version, each.num_rows) == (first.version, 20)
        assert len(each.search(query, 100)[0]) == 20
    reader.refresh()
    assert (reader.version, reader.num_rows) == (second.version, 30)
    assert reader.search(query, 1)[0][0].caption == "picture number 20"


def test_rollback_and_back(store: Store) -> None:
    versions = []
    for start in range(0, 30, 10):
        append(store, make_rows(start, start + 10))
        versions.append(index_and_publish(store).version)
    back = rollback(store)
    assert (back.version, back.previous_version, back.num_rows) == (versions[1], versions[2], 20)
    assert Retriever(store.uri, store.name).num_rows == 20
    assert rollback(store).version == versions[0]
    with pytest.raises(UserError, match=f"version {versions[0]} .* oldest"):
        rollback(store)
    assert rollback(store, to=versions[2]).num_rows == 30
    with pytest.raises(UserError, match=f"version 1 .* not a publication that is kept.*{versions[0]}"):
        rollback(store, to=1)


def test_a_rollback_does_not_wait_for_an_ingest_that_was_killed(store: Store) -> None:
    append(store, make_rows(0, 10))
    first = index_and_publish(store)
    append(store, make_rows(10, 20))
    index_and_publish(store)
    store.mark_unfinished()
    assert rollback(store).version == first.version
    with pytest.raises(UserError, match=r"are missing: the ingest .* did not end. Run it again"):
        index_and_publish(store)


def test_a_version_that_was_rolled_back_is_not_published_again_by_itself(store: Store) -> None:
    append(store, make_rows(0, 10))
    good = index_and_publish(store)
    append(store, make_rows(10, 15))
    bad = index_and_publish(store)
    rollback(store)
    refused = index_and_publish(store)
    assert refused.version == good.version
    assert failed(refused)[0].detail.endswith(f"`imagerag index rollback --to {bad.version}` undoes that")
    append(store, make_rows(15, 20))
    better = index_and_publish(store)
    assert better.published
    assert [entry.version for entry in status(store).history] == [better.version, good.version]
    assert rollback(store).version == good.version


def test_a_publication_that_was_killed_after_moving_the_tag_is_finished(store: Store) -> None:
    append(store, make_rows(0, 10))
    index = build_index(store, IndexConfig())
    store.dataset().tags.create("published", index.version)
    assert publish(store, index, PublishConfig()).published
    assert [entry.version for entry in status(store).history] == [index.version]


def test_features_belong_to_the_publication_whose_rows_they_are_of(store: Store) -> None:
    """As every night: rows are published, and then their features."""
    nights = []
    for start in range(0, 40, 10):
        append(store, make_rows(start, start + 10))
        assert index_and_publish(store, PublishConfig(keep=3)).published
        fill_all(store)
        nights.append(index_and_publish(store, PublishConfig(keep=3)).version)
    assert [entry.version for entry in status(store).history] == nights[:0:-1]
    assert [version["version"] for version in store.dataset().versions()] == nights[1:]


def test_other_metadata_of_the_same_rows_is_another_publication(store: Store) -> None:
    append(store, make_rows(0, 10))
    first = index_and_publish(store)
    store.delete(make_rows(0, 1)["id"])
    append(store, make_rows(0, 1, licence=["CC-BY-4.0"]))
    second = index_and_publish(store)
    assert [entry.version for entry in status(store).history] == [second.version, first.version]


def test_a_rollback_lands_on_a_version_with_all_features(store: Store) -> None:
    append(store, make_rows(0, 10))
    fill_all(store)
    complete = index_and_publish(store).version
    for start in (10, 20):
        append(store, make_rows(start, start + 10))
        without = index_and_publish(store).version
    assert len(status(store).history) == 3
    assert rollback(store).version == complete
    assert rollback(store, to=without).version == without
    fill_all(store, OTHER)
    index_and_publish(store)
    with pytest.raises(UserError, match=r"no earlier publication .* features of base-b .*--to"):
        rollback(store)


def test_rollback_needs_a_publication(store: Store) -> None:
    with pytest.raises(UserError, match=r"nothing was published of table 'images'.*imagerag index publish"):
        rollback(store)
