"""The password that a home's servers require."""

import fcntl
import os
import secrets
from pathlib import Path

from imagerag.errors import UserError

USER = "imagerag"


def password(home: Path) -> str:
    """Return the password of the servers of `home`, created at the first call; only the owner can read its file.

    Raises:
        UserError: if there is none yet and it can't be written.
    """
    path = home / "password"
    try:
        return _read(path) or _make(path)
    except OSError as error:
        raise UserError(f"the home keeps its servers' password in {path}: {error.strerror}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _make(path: Path) -> str:
    """Write a password into a file that does not exist, or that a killed process left empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        made = file.read()  # by another process, meanwhile
        if not made:
            made = secrets.token_urlsafe(24)
            file.write(made)
            file.flush()
        return made
