"""MLflow's SQLite databases in a home: made whole or not at all, and moved with the home.

MLflow makes its tables one by one, and can't continue if the process was killed between two of them. And it stores
absolute paths: the former path of a moved or copied home is derived from the experiments' artifact locations. A home
that two machines mount under different paths needs an MLflow server.
"""

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from imagerag.storage.locks import writer_lock

if TYPE_CHECKING:
    from sqlalchemy import Engine

logger = logging.getLogger(__name__)

ARTIFACTS = Path("mlflow", "artifacts")
"""Folder of MLflow's artifacts, relative to the home."""
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("tags", "value"),
    ("model_version_tags", "value"),
)


def runs_database(home: Path) -> Path:
    """Return the database of runs and models, made if it does not exist, with paths under `home`."""

    def make(uri: str) -> "Engine":
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        engine: Engine = SqlAlchemyStore(uri, (home / ARTIFACTS).as_uri()).engine
        return engine

    database = home / "mlflow" / "mlflow.db"
    _make(database, make)
    _follow_home(database, home)
    return database


def users_database(home: Path) -> Path:
    """Return the database of the server's users, made if it does not exist."""

    def make(uri: str) -> "Engine":
        from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

        store = SqlAlchemyStore()
        store.init_db(uri)
        engine: Engine = store.engine
        return engine

    database = home / "mlflow" / "auth.db"
    _make(database, make)
    return database


def configure_mlflow() -> None:
    """Set MLflow's environment variables, unless they are set. Call this before the first import of MLflow."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its default, 7, takes minutes to give up
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # it logs every table that it creates


def _make(database: Path, make: Callable[[str], "Engine"]) -> None:
    """Make the tables in another folder, and move the database to its place when it is complete."""
    folder = database.with_suffix(".new")
    if database.exists() and not folder.exists():
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with writer_lock(str(database.parent), database.stem):
        shutil.rmtree(folder, ignore_errors=True)  # of a killed process
        if database.exists():
            return
        configure_mlflow()
        folder.mkdir()
        unfinished = folder / database.name
        make(f"sqlite:///{unfinished}").dispose()
        unfinished.replace(database)
        folder.rmdir()


def _follow_home(database: Path, home: Path) -> None:
    """Rewrite paths under a former home to paths under `home`. Idempotent."""
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            return  # an empty file, whose tables MLflow makes
        query = "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE 'file://%'"
        locations = [Path(unquote(urlsplit(location).path)) for (location,) in connection.execute(query)]
        for former in {location.parents[1] for location in locations if location.parts[-2:] == ARTIFACTS.parts}:
            if former != home:
                _rebase(connection, former, home)
                logger.warning("the home was moved from %s to %s: updated the paths in MLflow's database", former, home)


def _rebase(connection: sqlite3.Connection, former: Path, home: Path) -> None:
    for old, new in ((f"{former.as_uri()}/", f"{home.as_uri()}/"), (f"{former}/", f"{home}/")):
        for table, column in _COLUMNS:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608
                (new, len(old) + 1, len(old), old),
            )
    # JSON with the path of an index table.
    source = "replace(dataset_source, ?, ?)"
    connection.execute(f"UPDATE datasets SET dataset_source = {source}", (f'"{former}/', f'"{home}/'))  # noqa: S608
