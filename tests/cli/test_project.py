"""Whose packages `flows` and `tasks` are."""

import subprocess
import sys
from pathlib import Path

import pytest

from imagerag.cli.project import project
from imagerag.errors import UserError


def test_it_is_the_folder_of_this_checkout() -> None:
    assert project() == Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", ["flows", "tasks"])
def test_somebody_elses_package_is_told_from_ours(name: str, tmp_path: Path) -> None:
    other = tmp_path / name / "__init__.py"
    other.parent.mkdir()
    other.write_text("")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from imagerag.cli import main; main()"
    command = [sys.executable, "-c", script, "ingest", "urls.csv"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the package {name!r} in {other.parent} is not that of imagerag-turbo")


def test_two_halves_of_different_installations_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "tasks" / "__init__.py"
    other.parent.mkdir()
    other.write_text('DISTRIBUTION = "imagerag-turbo"')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tasks", raising=False)
    with pytest.raises(UserError, match="the packages 'flows' and 'tasks' belong together"):
        project()
    sys.modules.pop("tasks")


def environment(home: Path) -> dict[str, str]:
    import os

    return os.environ | {"IMAGERAG_HOME": str(home / "home")}
