"""Atomic writes and compare-and-swap of files, in folders and object stores.

`replace_file` writes only if the file is unchanged since it was read: by `If-None-Match` and `If-Match` on S3, and
under a file lock in a folder. A read-modify-write with it never loses another writer's change.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from imagerag.errors import UserError

_MAX_PUT = 5 * 2**30
"""Bytes of one S3 request: s3fs can't make a multipart upload conditional."""
_NUM_PROBES = 4


class ConflictError(RuntimeError):
    """Another writer changed the file first, and nothing was written. Read the file again and retry."""


def write_file(uri: str, content: bytes) -> None:
    """Write a file atomically."""
    filesystem, path = fsspec.url_to_fs(uri)
    if isinstance(filesystem, LocalFileSystem):
        _replace(Path(path), content)
    else:
        filesystem.pipe_file(path, content)  # an object becomes visible when it is complete


def put_file(uri: str, source: Path) -> None:
    """Copy a local file to a URI atomically."""
    filesystem, path = fsspec.url_to_fs(uri)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.put_file(str(source), path)
        return
    with source.open("rb") as content:
        _replace(Path(path), content)


def read_tagged(uri: str) -> tuple[bytes | None, str | None]:
    """Return a file's content and its tag for `replace_file`, or `(None, None)` if it does not exist."""
    filesystem, path = fsspec.url_to_fs(uri)
    try:
        if isinstance(filesystem, LocalFileSystem):
            content = Path(path).read_bytes()
            return content, _digest(content)
        # The tag is read first: if the content is newer, `replace_file` fails, which is safe.
        tag = filesystem.info(path, refresh=True).get("ETag", "")
        return filesystem.cat_file(path), tag
    except FileNotFoundError:
        return None, None


def replace_file(uri: str, content: bytes, tag: str | None) -> str:
    """Write a file if its tag is still the one that `read_tagged` returned, and return the new tag.

    If the store reports a failure, or its answer is lost, the stored content decides: a request that was executed and
    then retried by the client conflicts with its own write.

    Raises:
        ConflictError: if the file has changed, or exists although `tag` is None.
    """
    filesystem, path = fsspec.url_to_fs(uri)
    if isinstance(filesystem, LocalFileSystem):
        _replace(Path(path), content, lambda: _is_tagged(Path(path), tag))
        return _digest(content)
    condition = {"mode": "create"} if tag is None else {"IfMatch": tag}
    try:
        written = filesystem.pipe_file(path, content, chunksize=_MAX_PUT, **condition)
        return str((written or {}).get("ETag", ""))
    except Exception as error:
        there, tag_there = read_tagged(uri)
        if there == content and tag_there is not None:
            return tag_there
        if tag_there != tag:
            raise ConflictError(f"another writer changed {uri}") from error
        raise


def keeps_writers_apart(uri: str) -> bool:
    """Return whether exactly one of several concurrent `replace_file` calls succeeds in this folder or store."""
    probe = f"{uri.rstrip('/')}/probe-{uuid4().hex}"

    def try_to_write(number: int, tag: str | None) -> bool:
        with suppress(ConflictError):
            replace_file(probe, str(number).encode(), tag)
            return True
        return False

    numbers = range(_NUM_PROBES)
    with ThreadPoolExecutor(_NUM_PROBES) as pool:
        created = list(pool.map(try_to_write, numbers, [None] * _NUM_PROBES))
        _, tag = read_tagged(probe)
        changed = list(pool.map(try_to_write, range(_NUM_PROBES, 2 * _NUM_PROBES), [tag] * _NUM_PROBES))
    filesystem, path = fsspec.url_to_fs(probe)
    filesystem.rm_file(path)
    return sum(created) == sum(changed) == 1


def write_json(uri: str, values: dict[str, Any]) -> None:
    """Write `values` as JSON, atomically."""
    write_file(uri, json.dumps(values, indent=1).encode())


def read_json(uri: str) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if it does not exist."""
    with suppress(FileNotFoundError), fsspec.open(uri) as file:
        values: dict[str, Any] = json.load(file)
        return values
    return None


def open_alone(path: Path, on_wait: Callable[[], None] = lambda: None) -> BufferedRandom:
    """Open a file, creating it if needed, with an exclusive lock until it is closed or removed.

    The operating system releases the lock when the process ends. `on_wait` is called before waiting for another holder.
    """
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the previous holder removed or renamed the file


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Yield a local path of a folder: the folder itself if it is local, else a temporary copy.

    Raises:
        UserError: if a remote folder does not exist.
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


def _replace(path: Path, content: bytes | IO[bytes], may_be_written: Callable[[], bool] = lambda: True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with open_alone(partial) as file:
        if not may_be_written():
            partial.unlink()
            raise ConflictError(f"another writer changed {path}")
        file.truncate(0)
        shutil.copyfileobj(io.BytesIO(content) if isinstance(content, bytes) else content, file)
        file.flush()
        os.fsync(file.fileno())
        partial.replace(path)


def _is_tagged(path: Path, tag: str | None) -> bool:
    return read_tagged(str(path))[1] == tag


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
