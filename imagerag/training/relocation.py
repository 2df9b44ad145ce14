"""A home that was moved or copied: its MLflow database names files by absolute paths, which have to follow.

MLflow has no relative ones. Where a home was follows from the database itself: from where its experiments keep
artifacts. A home is at one place at a time; one that two machines see under two paths needs an MLflow server.
"""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

logger = logging.getLogger(__name__)

ARTIFACTS = Path("mlflow", "artifacts")
"""Of a home."""
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
    """Have everything in an MLflow database that is under the home's former place be under `home`. Safe to repeat."""
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
                logger.warning("the home was moved from %s to %s: MLflow's artifacts follow", former, home)


def _rebase(connection: sqlite3.Connection, former: Path, home: Path) -> None:
    for old, new in ((f"{former.as_uri()}/", f"{home.as_uri()}/"), (f"{former}/", f"{home}/")):
        for table, column in _COLUMNS:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608
                (new, len(old) + 1, len(old), old),
            )
    # JSON that names a table of the index.
    source = "replace(dataset_source, ?, ?)"
    connection.execute(f"UPDATE datasets SET dataset_source = {source}", (f'"{former}/', f'"{home}/'))  # noqa: S608
