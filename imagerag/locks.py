"""One writer at a time, where writers share a file system."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


@contextmanager
def writer_lock(uri: str, name: str) -> Iterator[None]:
    """Keep other writers of `name` in a folder out: they wait, and the lock of a process that dies is freed.

    The thread that holds it may take it again. An object store has no such lock.
    """
    folder = local_folder(uri)
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s is being written by another process or thread; waiting for it", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def local_folder(uri: str) -> Path | None:
    """Return the folder that a URI names, if it is on this machine's file system."""
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri)
