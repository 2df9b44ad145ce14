"""Small files that are whole or not there, in a folder or an object store."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from imagerag.errors import UserError


def write_file(uri: str, content: bytes) -> None:
    """Write a file; a reader never sees half of it."""
    filesystem, path = fsspec.url_to_fs(uri)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    filesystem.pipe_file(f"{path}.partial", content)
    filesystem.mv(f"{path}.partial", path)


def write_json(uri: str, values: dict[str, Any]) -> None:
    """Write what JSON can hold, likewise."""
    write_file(uri, json.dumps(values, indent=1).encode())


def read_json(uri: str) -> dict[str, Any] | None:
    """Return what `write_json` wrote, if there is such a file."""
    with suppress(FileNotFoundError), fsspec.open(uri) as file:
        values: dict[str, Any] = json.load(file)
        return values
    return None


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Yield a folder on this machine: itself where it is one, else a copy for the length of the block.

    Raises:
        UserError: if there is nothing to copy.
    """
    filesystem, path = fsspec.url_to_fs(uri)
    if isinstance(filesystem, LocalFileSystem):
        yield Path(path)
        return
    with TemporaryDirectory() as folder:
        try:
            filesystem.get(f"{path.rstrip('/')}/", f"{folder}/", recursive=True)
        except FileNotFoundError:
            raise UserError(f"there is no folder {uri}") from None
        yield Path(folder)
