"""The password of a home: what its own servers ask of whoever reaches their ports on loopback."""

import fcntl
import os
import secrets
from pathlib import Path

from imagerag.errors import UserError

USER = "imagerag"


def password(home: Path) -> str:
    """Return the password of the servers of `home`, made by whoever asks first; only its owner can read the file.

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
    """Write one into a file that is there but empty, as a killed process may leave it, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        made = file.read()  # by another process, meanwhile
        if not made:
            made = secrets.token_urlsafe(24)
            file.write(made)
            file.flush()
        return made
