"""The model in use, as a candidate is compared with it: its own weights, its own index, where all workers can read."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from imagerag.artifacts import CachedFeatures
from imagerag.evaluation.ways import digest_of_weights
from imagerag.registry.champion import champions_behind, present_champion
from imagerag.registry.promotion import promote
from imagerag.registry.versions import register, resolve_version
from imagerag.retrieval.takedown import remove_rows
from imagerag.settings import Settings
from tests.registry.conftest import NAME, Home
from tests.registry.test_versions import WHY, publish_more


@pytest.fixture
def settings(home: Home) -> Iterator[Settings]:
    """With trainings in a store that is no folder of this machine."""
    yield home.settings.model_copy(update={"training_uri": "memory://trainings"})
    fsspec.filesystem("memory").store.clear()


def test_the_champion_keeps_its_own_index_and_lies_where_workers_read(home: Home, settings: Settings) -> None:
    first, second = home.finetuned("first"), home.finetuned("second")
    assert present_champion(settings, first) is None
    promote(settings, register(first, settings).version, **WHY)
    assert present_champion(settings, first) is None, "the candidate would be the champion itself"
    own = home.store.index_version(home.store.version)
    publish_more(home)
    for candidate in (first, second):
        champion = present_champion(settings, candidate)
        assert champion is not None
        assert champion.deployed is not None
        assert champion.deployed.index == own
        assert champion.is_same_weights == (candidate == first)
        assert champion.deployed.folder.startswith(f"memory://trainings/{NAME}/champions/1-")
        assert digest_of_weights(champion.deployed.folder) == digest_of_weights(first.uri)
    other = present_champion(settings, replace(second, base_digest="0" * 64))
    assert other is not None
    assert other.deployed is None

    remove_rows(home.store, urls=["https://example.org/3.png"])
    champion = present_champion(settings, second)
    assert champion is not None
    assert champion.deployed is not None
    assert champion.deployed.index == home.store.index_version(home.store.version), "its own was taken down"


def test_a_portable_champion_brings_its_index(home: Home) -> None:
    promote(home.settings, register(home.finetuned("first"), home.settings, portable=True).version, **WHY)
    champion = present_champion(home.settings, home.finetuned("second"))
    assert champion is not None
    assert champion.deployed is not None
    assert Path(champion.deployed.index.uri).is_relative_to(champion.deployed.folder)
    assert Path(champion.deployed.index.uri, f"{NAME}.lance").is_dir()


def test_a_champion_is_behind_only_newer_versions_of_its_own_index(home: Home) -> None:
    settings, now = home.settings, home.store.version
    promote(settings, register(home.finetuned("first"), settings).version, **WHY)
    cached = CachedFeatures(
        uri=settings.index_uri, table=NAME, version=now + 1, num_rows=8, num_added=0, base_id=str(home.base),
        fit="auto", features_digest=resolve_version(settings, "champion").pinned("features_digest"),
    )  # fmt: skip
    assert len(list(champions_behind(settings, cached, now + 1))) == 1
    assert list(champions_behind(settings, cached, now)) == []
    for other in ({"uri": "/elsewhere"}, {"table": "others"}, {"features_digest": "0" * 64}):
        assert list(champions_behind(settings, replace(cached, **other), now + 1)) == [], other
