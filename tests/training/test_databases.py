import multiprocessing
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from imagerag.settings import Settings
from imagerag.training.databases import users_database
from imagerag.training.tracking import mlflow_client, tracking_uri


def use_runs(home: Path) -> None:
    mlflow_client(tracking_uri(Settings(home=home))).search_experiments()


def _tables(folder: Path) -> list[str]:
    """All databases' tables."""
    names = []
    for path in folder.rglob("*.db"):
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as found:
            names += [name for (name,) in found.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return names


@pytest.mark.parametrize(
    ("use", "half_way"),
    [
        (use_runs, lambda names: any(name.startswith("_alembic_tmp") for name in names)),
        (users_database, lambda names: len(names) > 1),
    ],
)
def test_a_killed_process_leaves_no_half_made_database(
    tmp_path: Path, use: Callable[[Path], object], half_way: Callable[[list[str]], bool]
) -> None:
    process = multiprocessing.get_context("fork").Process(target=use, args=(tmp_path,))
    process.start()
    while process.is_alive() and not half_way(_tables(tmp_path)):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -9
    use(tmp_path)
    assert [path.name for path in (tmp_path / "mlflow").iterdir() if path.is_dir()] == []
    use(tmp_path)


def test_what_a_process_left_that_was_killed_at_the_end_is_removed(tmp_path: Path) -> None:
    use_runs(tmp_path)
    (tmp_path / "mlflow" / "mlflow.new").mkdir()
    use_runs(tmp_path)
    assert not (tmp_path / "mlflow" / "mlflow.new").exists()


def test_an_empty_database_gets_its_tables(tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").touch()
    use_runs(tmp_path)
