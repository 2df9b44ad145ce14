from pathlib import Path

import pytest

from imagerag.retrieval.store import Store
from tests.retrieval.rows import ENCODER


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty table."""
    store = Store(str(tmp_path / "index"), "images")
    store.open_or_create(ENCODER)
    return store
