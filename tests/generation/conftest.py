from pathlib import Path

import pytest

from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.retrieval.store import Store
from tests.generation.folders import write_lcm, write_sd, write_sdxl
from tests.generation.with_index import fill, make_adapter, make_pipeline, write_store
from tests.retrieval.rows import index_and_publish


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder in each format."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "sd-turbo": write_sd(folder / "sd-turbo"),
        "sd-2-teacher": write_sd(folder / "sd-2-teacher", seed=1, prediction_type="v_prediction"),
        "fp16-only": write_sd(folder / "fp16-only", variant="fp16"),
        "sharded": write_sd(folder / "sharded", max_shard_size="200KB"),
        "sdxl-turbo": write_sdxl(folder / "sdxl-turbo"),
        "lcm": write_lcm(folder / "lcm"),
    }


@pytest.fixture(scope="module")
def plain() -> ImageRAGTurboPipeline:
    """A pipeline without an index."""
    return make_pipeline(make_adapter())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, plain: ImageRAGTurboPipeline) -> Store:
    """A small index with features, which is only read."""
    store = write_store(tmp_path_factory.mktemp("index"), plain)
    fill(store, plain)
    index_and_publish(store)
    return store


@pytest.fixture
def pipe(plain: ImageRAGTurboPipeline, store: Store) -> ImageRAGTurboPipeline:
    """A pipeline with that index."""
    return make_pipeline(make_adapter()).use_index(store.uri, store.name)
