"""Settings and names."""

from pathlib import Path

import pytest

from imagerag.errors import UserError
from imagerag.settings import Settings, check_name


def test_everything_lies_under_the_home_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path / "home"))
    settings = Settings()
    assert settings.index_uri == str(tmp_path / "home" / "index")
    assert settings.shards_of("cats") == str(tmp_path / "home" / "shards" / "cats")

    monkeypatch.setenv("IMAGERAG_SHARDS_URI", "s3://bucket/shards/")
    assert Settings().shards_of("cats") == "s3://bucket/shards/cats"
    assert not (tmp_path / "home").exists(), "reading settings makes nothing"


def test_a_relative_home_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(home=Path("here"))
    monkeypatch.chdir("/")
    assert settings.home == tmp_path / "here"
    assert settings.index_uri == str(tmp_path / "here" / "index")


@pytest.mark.parametrize("name", ["", "../other", "Cats", "a b", "-cats", "a" * 64, "cats.lance"])
def test_a_bad_name_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(UserError, match="1 to 63 characters"):
        check_name(name)
