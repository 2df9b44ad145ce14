"""Writer locks across processes and machines.

In a folder, a lock is a file lock of the operating system, released when the process ends. In an object store, it is a
lease: a small object that names its holder, written by compare-and-swap and renewed while it is held. A waiting process
takes a lease over when it was not renewed for `LEASE_S` by its own clock, or at once if the holder was a process of the
same machine that has ended. `check_locks` tells a holder before each commit whether it lost a lease.
"""

import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from io import BufferedRandom
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from imagerag.storage.files import ConflictError, open_alone, read_tagged, replace_file

logger = logging.getLogger(__name__)

LEASE_S = 60.0
"""Seconds after which a lease that was not renewed may be taken over."""
_RENEW_EVERY_S = 15.0
_FIRST_POLL_S, _LAST_POLL_S = 0.1, 3.0

# CLOCK_MONOTONIC does not advance while a machine is suspended.
_now = partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic

OnWait = Callable[[str], None]
"""Called before waiting, with a message that says who holds the lock and since when."""
_job: ContextVar[str | None] = ContextVar("job", default=None)


class LockLostError(RuntimeError):
    """This process did not renew a lock in time, and another one has it now. Run the same command again to continue."""


@contextmanager
def writer_lock(uri: str, name: str, on_wait: OnWait = logger.info) -> Iterator[None]:
    """Hold the exclusive lock `name` in a folder or an object store; other writers wait for it.

    The lock is reentrant within a thread.
    """
    lock = _lock_of(f"{uri.rstrip('/')}/{name}.lock")
    lock.acquire(on_wait)
    try:
        yield
    finally:
        lock.release()


def check_locks() -> None:
    """Check, before a commit, that this thread still holds all locks that it acquired.

    Raises:
        LockLostError: if it lost one.
    """
    for lock in list(_locks.values()):
        lock.check()


@contextmanager
def named_job(name: str) -> Iterator[None]:
    """Set the name that processes waiting for this thread's locks see, instead of the command line."""
    token = _job.set(name)
    try:
        yield
    finally:
        _job.reset(token)


def local_folder(uri: str) -> Path | None:
    """Return the path of a local folder's URI, or None for a remote one."""
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri)


class _Lock:
    """A lock as the threads of this process share it: reentrant, and held by one thread at a time."""

    def __init__(self, uri: str) -> None:
        path = local_folder(uri)
        self._uri = uri
        self._thread_lock = threading.RLock()
        self._depth, self._thread_id = 0, 0
        self._medium: _FileLock | _Lease = _Lease(uri) if path is None else _FileLock(path)

    def acquire(self, on_wait: OnWait) -> None:
        if not self._thread_lock.acquire(blocking=False):
            on_wait(f"{_named(self._uri)} is held by another thread of this process; waiting for it")
            self._thread_lock.acquire()
        try:
            if self._depth == 0:
                self._medium.acquire(on_wait)
                self._thread_id = threading.get_ident()
            self._depth += 1
        except BaseException:
            self._thread_lock.release()
            raise

    def release(self) -> None:
        self._depth -= 1
        try:
            if self._depth == 0:
                self._medium.release()
        finally:
            self._thread_lock.release()

    def check(self) -> None:
        if self._depth and self._thread_id == threading.get_ident():
            self._medium.check()


class _FileLock:
    """A lock of the operating system on a file that names its holder; the file is removed on release."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BufferedRandom | None = None

    def acquire(self, on_wait: OnWait) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_alone(self._path, lambda: on_wait(_waiting(str(self._path), self._holder())))
        self._file.truncate(0)
        self._file.write(json.dumps(_about_this_job()).encode())
        self._file.flush()

    def release(self) -> None:
        assert self._file is not None
        self._path.unlink(missing_ok=True)
        self._file.close()

    def check(self) -> None:
        """Do nothing: a file lock can't be lost."""

    def _holder(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):  # it was released, or the holder is not written yet
            holder: dict[str, Any] = json.loads(self._path.read_bytes())
            return holder
        return {}


class _Lease:
    """An object that names the holder of a lock; empty or missing while the lock is free."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def acquire(self, on_wait: OnWait) -> None:
        self._holder = _about_this_job() | {"id": uuid4().hex, "renewed": 0}
        self._take(on_wait)
        self._lost = False
        self._renewing = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=self._uri, daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._done.set()
        self._thread.join()
        try:
            if not self._lost:
                replace_file(self._uri, b"{}", self._tag)
        except ConflictError:
            logger.warning("another process took %s over before it was released", _named(self._uri))

    def check(self) -> None:
        if self._lost or _now() - self._renewed_at > LEASE_S / 2:
            self._renew()

    def _take(self, on_wait: OnWait) -> None:
        seen, since, told, pause_s = "", 0.0, None, _FIRST_POLL_S
        while True:
            content, tag = read_tagged(self._uri)
            holder = json.loads(content) if content else {}
            if tag != seen:
                seen, since = tag or "", _now()
            if not holder or _is_dead(holder) or _now() - since > LEASE_S:
                try:
                    self._put(tag)
                    return
                except ConflictError:
                    continue
            if holder["id"] != told:
                told = holder["id"]
                on_wait(_waiting(self._uri, holder))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)

    def _put(self, tag: str | None) -> None:
        started = _now()
        self._tag = replace_file(self._uri, json.dumps(self._holder).encode(), tag)
        self._renewed_at = started

    def _renew(self) -> None:
        with self._renewing:
            if not self._lost:
                self._holder["renewed"] += 1
                try:
                    self._put(self._tag)
                except ConflictError:
                    self._lost = True
            if self._lost:
                holder = json.loads(read_tagged(self._uri)[0] or b"{}")
                raise LockLostError(
                    f"{_named(self._uri)} was not renewed for more than {LEASE_S:.0f} s, and was taken over by "
                    f"{_described(holder)}. Nothing more is written; run the same again to go on"
                )

    def _keep(self) -> None:
        while not self._done.wait(_RENEW_EVERY_S):
            try:
                self._renew()
            except LockLostError as error:
                logger.error("%s", error)
                return
            except Exception as error:  # noqa: BLE001 - stores raise their own exceptions; the next interval retries
                logger.warning("%s could not be renewed: %s", _named(self._uri), error)


_locks: dict[str, _Lock] = {}
_locks_lock = threading.Lock()


def _lock_of(uri: str) -> _Lock:
    with _locks_lock:
        return _locks.setdefault(uri, _Lock(uri))


def _about_this_job() -> dict[str, Any]:
    return {
        "job": _job.get() or " ".join([Path(sys.argv[0]).stem, *sys.argv[1:2]]),
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _machine() -> str:
    """Return an id shared by the processes that see each other's process ids; containers have different ones."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and namespace.exists():
        return f"{boot.read_text().strip()}/{namespace.stat().st_ino}"
    return platform.node()


def _is_dead(holder: dict[str, Any]) -> bool:
    return holder["machine"] == _machine() and not psutil.pid_exists(holder["pid"])


def _waiting(uri: str, holder: dict[str, Any]) -> str:
    return f"{_named(uri)} is held by {_described(holder)}; waiting for it"


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"`{holder['job']}` (process {holder['pid']} on {holder['host']}) since {holder['since']}"


def _named(uri: str) -> str:
    return f"the lock {uri}"
