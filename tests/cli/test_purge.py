"""`imagerag purge`: all of a home, and nothing else."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from imagerag.cli import app
from imagerag.errors import UserError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    for name in ("index/images.lance", "shards/mine", "mlflow"):
        (home / name).mkdir(parents=True)
    (home / "index/images.lance/data").write_bytes(bytes(2_500_000))
    (home / "password").write_text("secret")
    monkeypatch.setenv("IMAGERAG_HOME", str(home))
    return home


def test_it_says_what_goes_and_asks(home: Path) -> None:
    result = CliRunner().invoke(app, ["purge"], input="n\n")
    assert isinstance(result.exception, UserError)
    assert "index                2.5 MB" in result.output
    assert "Delete all of it? [y/N]" in result.output
    assert (home / "index/images.lance/data").exists()


def test_all_of_it_goes(home: Path) -> None:
    result = CliRunner().invoke(app, ["purge", "--yes"])
    assert result.exit_code == 0, result.output
    assert not home.exists()
    assert "nothing to delete" in CliRunner().invoke(app, ["purge", "--yes"]).output


def test_what_is_not_ours_stays(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").touch()
    (home / "holiday.jpg").touch()
    (home / "models").symlink_to(photos)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("IMAGERAG_TRAINING_URI", str(elsewhere))
    result = CliRunner().invoke(app, ["purge"], input="y\n")
    assert result.exit_code == 0, result.output
    assert [path.name for path in home.iterdir()] == ["holiday.jpg"]
    assert (photos / "cat.jpg").exists()
    assert elsewhere.exists()
    assert f"{elsewhere} is outside of the home" in result.output
    assert "other files: holiday.jpg" in result.output
