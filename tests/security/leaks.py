"""Where a secret was written down."""

from contextlib import suppress
from pathlib import Path

from imagerag import credentials

AWS_SECRET, URL_PASSWORD = "a-secret-access-key", "a-password-in-a-url"
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": AWS_SECRET,
    "AWS_ENDPOINT_URL": f"https://somebody:{URL_PASSWORD}@store.example",
}


def files_with_secrets(home: Path) -> list[Path]:
    """Return the files under a home that hold its password or a secret of `ENVIRONMENT`, except the password's own."""
    secrets = (credentials.password(home), AWS_SECRET, URL_PASSWORD)
    found = []
    for path in home.rglob("*"):
        if path.is_file() and path != home / "password":
            with suppress(FileNotFoundError):  # the servers are running
                content = path.read_bytes()
                found += [path for secret in secrets if secret.encode() in content]
    return found
