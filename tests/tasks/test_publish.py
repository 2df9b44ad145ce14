"""What a publication announces."""

from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger

import tasks.publish
from imagerag.retrieval.feature_column import prepare
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, published_version, rollback
from imagerag.retrieval.schema import FeatureIdentity
from imagerag.retrieval.store import Store
from tests.retrieval.rows import ENCODER, append, make_rows

Announced = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> Announced:
    """Events, which would go to a server."""
    events: Announced = []
    monkeypatch.setattr(tasks.publish, "emit_event", lambda event, _, payload: events.append((event, payload)))
    return events


def publish(store: Store) -> None:
    with disable_run_logger():
        tasks.publish.publish_index.fn(build_index(store, IndexConfig()), PublishConfig())


def test_features_of_every_base_model_of_an_index_are_asked_for(tmp_path: Path, announced: Announced) -> None:
    store = Store(str(tmp_path), "mine")
    store.open_or_create(ENCODER)
    append(store, make_rows(0, 30))
    publish(store)
    (published, wanted) = announced
    assert published[0] == "imagerag.index.published"
    assert wanted == ("imagerag.features.wanted", {"version": published[1]["version"], "base": "tiny"}), "the default"

    announced.clear()
    publish(store)
    assert announced == [], "it was published before"

    for base, digest in {"tiny": "a" * 64, "sd-turbo": "b" * 64}.items():
        with store.writer_lock():
            prepare(store, FeatureIdentity(base=base, fit="auto", digest=digest, shape=(4, 2, 2)))
    append(store, make_rows(30, 40))
    publish(store)
    assert [payload["base"] for event, payload in announced if event == "imagerag.features.wanted"] == [
        "tiny",
        "sd-turbo",
    ]


def test_a_publication_that_failed_after_moving_the_tag_is_announced_by_its_retry(
    tmp_path: Path, announced: Announced, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: Store) -> None:
        raise OSError("503 Slow Down")

    store = Store(str(tmp_path), "mine")
    store.open_or_create(ENCODER)
    append(store, make_rows(0, 30))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "clean_up", refuse)
        with pytest.raises(OSError, match="503"):
            publish(store)
    version = published_version(store)
    assert version is not None
    assert announced == []
    publish(store)
    assert [(event, payload["version"]) for event, payload in announced] == [
        ("imagerag.index.published", version), ("imagerag.features.wanted", version)
    ]  # fmt: skip


def test_what_is_not_published_is_not_announced(tmp_path: Path, announced: Announced) -> None:
    store = Store(str(tmp_path), "mine")
    store.open_or_create(ENCODER)
    publish(store)
    assert announced == [], "an empty table"
    for start in (0, 10):
        append(store, make_rows(start, start + 10))
        publish(store)
    rollback(store)
    announced.clear()
    publish(store)
    assert announced == [], "it was rolled back"
