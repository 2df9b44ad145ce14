"""Small files that are whole or not there, in a folder or an object store."""

import json
from contextlib import suppress
from typing import Any

import fsspec


def write_json(uri: str, values: dict[str, Any]) -> None:
    """Write what JSON can hold; a reader never sees half of it."""
    filesystem, path = fsspec.url_to_fs(uri)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    filesystem.pipe_file(f"{path}.partial", json.dumps(values, indent=1).encode())
    filesystem.mv(f"{path}.partial", path)


def read_json(uri: str) -> dict[str, Any] | None:
    """Return what `write_json` wrote, if there is such a file."""
    with suppress(FileNotFoundError), fsspec.open(uri) as file:
        values: dict[str, Any] = json.load(file)
        return values
    return None
