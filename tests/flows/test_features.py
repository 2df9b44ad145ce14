"""`features` through a real Prefect server."""

from pathlib import Path

import pytest

from flows.features import features
from imagerag.hspace.config import FeaturesConfig
from imagerag.retrieval.publish import status
from imagerag.retrieval.store import Store
from tests.generation.folders import write_sd
from tests.retrieval.rows import ENCODER, append, index_and_publish, make_rows

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("ray_session", "prefect_api_url")]


def test_features_are_published_and_a_second_run_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path))
    base = str(write_sd(tmp_path / "base"))
    store = Store(str(tmp_path / "index"), "flow")
    store.open_or_create(ENCODER)
    append(store, make_rows(0, 30))
    before = index_and_publish(store)
    assert status(store).features == ()

    parameters = {"name": "flow", "features": FeaturesConfig(base=base, device="cpu")}
    first = features(**parameters)
    assert first.cached.num_added == 30
    assert first.publication.published
    assert first.publication.version is not None
    assert before.version is not None
    assert first.publication.version > before.version
    (cached,) = status(store).features
    assert (cached.base, cached.num_rows) == (base, 30)
    assert "30 of 30 rows" in first.markdown()

    second = features(**parameters)
    assert second.cached.num_added == 0
    assert second.publication.version == first.publication.version == status(store).newest_version
