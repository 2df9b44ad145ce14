"""The password of a home: one, whoever asks first, and whatever was killed while it was written."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from imagerag.cli import app
from imagerag.credentials import USER, password
from imagerag.errors import UserError


def test_all_who_ask_at_once_get_the_same_and_nothing_else_is_left(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with ThreadPoolExecutor(16) as threads:
        found = set(threads.map(lambda _: password(home), range(64)))
    assert len(found) == 1
    assert len(found.pop()) == 32
    assert [path.name for path in home.iterdir()] == ["password"]
    assert stat.S_IMODE((home / "password").stat().st_mode) == 0o600


def test_a_file_that_a_killed_process_left_empty_is_filled(tmp_path: Path) -> None:
    (tmp_path / "password").touch(mode=0o600)
    assert len(password(tmp_path)) == 32
    assert password(tmp_path) == (tmp_path / "password").read_text()


def test_no_hard_links_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.link")  # as on FAT, and on object stores that are mounted as folders
    assert password(tmp_path)


@pytest.mark.parametrize("arguments", [["settings"], ["settings", "--json"], ["doctor"]])
def test_no_command_shows_it(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = password(tmp_path)
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path))
    for name in ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"):
        monkeypatch.setenv(name, f"{USER}:{secret}")
    others = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY")
    for name in others:
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"postgresql://me:{secret}@db/mlflow")
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert str(tmp_path) in result.output
    assert secret not in result.output


def test_a_home_that_cant_be_written_is_named() -> None:
    with pytest.raises(UserError, match="the home keeps its servers' password in /proc/home/password: No such file"):
        password(Path("/proc/home"))
