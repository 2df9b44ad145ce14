"""The password that a home's servers require."""

import os
import secrets
from pathlib import Path

USER = "imagerag"


def password(home: Path) -> str:
    """Return the password of the servers of `home`, created at the first call; only the owner can read its file."""
    path = home / "password"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    if not path.exists():
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24))
        try:
            os.link(draft, path)  # unlike a rename, it keeps a file that another process has created meanwhile
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text()
