"""Which corpus is meant where none is named."""

from pathlib import Path

import pytest

from imagerag.cli.names import corpus_name, with_name
from imagerag.errors import UserError


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path))
    return tmp_path / "index"


def test_the_only_one_is_meant(index: Path) -> None:
    assert corpus_name(None) == "images"
    (index / "sample.lance").mkdir(parents=True)
    (index / "sample.removed.lance").mkdir()
    assert corpus_name(None) == "sample"
    assert corpus_name("mine") == "mine"


def test_of_several_one_has_to_be_chosen(index: Path) -> None:
    for name in ("mine", "sample"):
        (index / f"{name}.lance").mkdir(parents=True)
    with pytest.raises(UserError, match="choose one by --name: mine, sample"):
        corpus_name(None)
    (index / "images.lance").mkdir()
    assert corpus_name(None) == "images"


def test_a_name_that_cannot_be_is_refused(index: Path) -> None:
    with pytest.raises(UserError, match="a corpus name has"):
        corpus_name("../mine")


def test_a_file_of_parameters_can_name_the_corpus(index: Path) -> None:
    (index / "sample.lance").mkdir(parents=True)
    assert with_name({"name": "mine"}, None) == {"name": "mine"}
    assert with_name({"name": "mine"}, "other") == {"name": "other"}
    assert with_name({"group": "a"}, None) == {"group": "a", "name": "sample"}
