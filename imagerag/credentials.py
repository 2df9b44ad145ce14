"""The password of a home: what its own servers ask of whoever reaches their ports on loopback."""

import os
import secrets
from pathlib import Path

USER = "imagerag"


def password(home: Path) -> str:
    """Return the password of the servers of `home`, made by whoever asks first; only its owner can read the file."""
    path = home / "password"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    if not path.exists():
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24))
        try:
            os.link(draft, path)  # unlike a rename, it leaves what another process has made meanwhile
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text()
