"""Relocation of a moved or copied home: rewrites the absolute paths in its MLflow database.

MLflow does not support relative paths. The former path of the home is derived from the experiments' artifact locations.
A home that two machines mount under different paths needs an MLflow server.
"""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

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


def follow_home(database: Path, home: Path) -> None:
    """Rewrite paths under a former home in an MLflow database to paths under `home`. Idempotent."""
    if not database.is_file():
        return
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            return
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
