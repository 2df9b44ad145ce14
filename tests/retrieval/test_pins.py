"""Who keeps which version, for how long, and what a reader is told whose version is gone."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from imagerag.errors import VersionGoneError
from imagerag.retrieval import pins as module
from imagerag.retrieval.pins import JOB, TRAINING, held, pin, pins, unpin
from imagerag.retrieval.publish import PublishConfig
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import remove_rows
from tests.retrieval.rows import DIM, append, embeddings, index_and_publish, make_rows


def publish_more(store: Store, times: int = 1) -> None:
    """Publish further versions, and keep none before the last."""
    for _ in range(times):
        start = store.count()
        append(store, make_rows(start, start + 5))
        assert index_and_publish(store, PublishConfig(keep=1)).published


@pytest.fixture
def published(store: Store) -> tuple[Store, int]:
    publish_more(store)
    return store, store.version


def renewed_at(store: Store, label: str) -> datetime:
    at: datetime = store.dataset().tags.list()[f"pin-{label}"]["updated_at"]
    return at


def test_a_pin_moves_and_is_let_go(published: tuple[Store, int]) -> None:
    store, first = published
    pin(store, first, "model-1")
    publish_more(store)
    second = store.version
    assert pins(store) == {"model-1": first}
    pin(store, second, "model-1")
    assert pins(store) == {"model-1": second}
    for _ in range(2):
        unpin(store, "model-1")
    assert pins(store) == {}
    with pytest.raises(VersionGoneError, match="version 99 of table 'images'"):
        pin(store, 99, "model-1")


def test_what_a_job_reads_stays_while_it_runs(published: tuple[Store, int]) -> None:
    store, version = published
    with held(store, version, f"{JOB}evaluation-a"):
        publish_more(store, times=3)
        assert Retriever(store.uri, store.name, version=version).read(["id"]).num_rows == 5
    assert pins(store) == {}
    publish_more(store)
    assert not store.has(version)


def test_the_next_try_takes_over_what_a_failed_one_left(published: tuple[Store, int]) -> None:
    store, version = published
    with pytest.raises(ZeroDivisionError), held(store, version, f"{TRAINING}a"):
        raise ZeroDivisionError
    publish_more(store)
    assert pins(store) == {f"{TRAINING}a": version}
    with held(store, version, f"{TRAINING}a"):
        pass
    assert pins(store) == {}


def test_the_pin_of_a_killed_job_is_removed_by_the_next_publication(
    published: tuple[Store, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, version = published
    for label in ("model-1", f"{TRAINING}a", f"{JOB}a"):
        pin(store, version, label)
    publish_more(store)
    assert set(pins(store)) == {"model-1", f"{TRAINING}a", f"{JOB}a"}, "they may rest for some time"
    monkeypatch.setattr(module, "_MAY_REST", {JOB: timedelta(0), TRAINING: timedelta(days=1)})
    publish_more(store)
    assert set(pins(store)) == {"model-1", f"{TRAINING}a"}
    monkeypatch.setattr(module, "_MAY_REST", {JOB: timedelta(0), TRAINING: timedelta(0)})
    publish_more(store)
    assert pins(store) == {"model-1": version}, "a model's is removed by people only"
    assert store.has(version)


def test_a_pin_is_renewed_until_a_takedown_removes_it(
    published: tuple[Store, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, version = published
    monkeypatch.setattr(module, "_RENEW_EVERY_S", 0.01)
    label = f"{JOB}a"
    with held(store, version, label):
        first = renewed_at(store, label)
        while renewed_at(store, label) == first:
            time.sleep(0.01)
        remove_rows(store, urls=["https://example.org/1.png"])
        time.sleep(0.1)
        assert pins(store) == {}
    assert len(store.dataset().versions()) == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda reader, query: reader.search(query, 3),
        lambda reader, query: reader.search(query, 3, by="hybrid", texts=["picture"]),
        lambda reader, query: reader.search(None, 3, by="words", texts=["picture"]),
        lambda reader, query: reader.fetch(["0" * 40]),
        lambda reader, query: reader.read(["caption"]),
        lambda reader, query: reader.take([0], ["caption"]),
        lambda reader, query: reader.sample(2),
    ],
    ids=["caption", "hybrid", "words", "fetch", "read", "take", "sample"],
)
def test_a_reader_whose_version_is_gone_is_told_so(
    published: tuple[Store, int], read: Callable[[Retriever, object], object]
) -> None:
    store, version = published
    reader, query = Retriever(store.uri, store.name), embeddings(0, 1, DIM)
    remove_rows(store, urls=["https://example.org/4.png"])
    with pytest.raises(VersionGoneError, match=rf"version {version} of table 'images' .* `imagerag index status"):
        read(reader, query)
    reader.refresh()
    assert len(reader.search(query, 8)[0]) == 4
