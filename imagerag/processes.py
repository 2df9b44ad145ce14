"""Processes of a home: each is started with a log and a record, found by its record, waited for, and stopped.

Which processes there are is in `services.py`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from imagerag.errors import UserError
from imagerag.storage.files import write_json

START_TIMEOUT_S = 180.0
_ANSWER_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
# The kernel kills the child when its parent dies, so that kill -9 leaves no server behind (Linux; 1 is
# PR_SET_PDEATHSIG). The child sets this itself, because Popen's preexec_fn is unsafe with threads, and ends if its
# parent, whose process id is the first argument, died before.
_DYING_WITH_PARENT = (
    "-c",
    "import ctypes, os, signal, sys; "
    "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])",
)


class ServiceError(UserError):
    """A server did not start, or does not answer."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A process started for a home, identified by process id and start time."""

    name: str
    pid: int
    started: float
    url: str

    @property
    def running(self) -> bool:
        """Whether this process still runs; the start time detects a reused process id."""
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


def find(home: Path, name: str) -> Service | None:
    """Return the running service `name` of this home, if there is one."""
    try:
        service = Service(**json.loads(record_of(home, name).read_text()))
    except FileNotFoundError:
        return None
    return service if service.running else None


def start(
    home: Path, name: str, command: tuple[str, ...], environment: Mapping[str, str], *, url: str, stay: bool
) -> Service:
    """Start a Python module in its own session. It ends with this process, unless it is to `stay` and gets a record."""
    log = _log(home, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *([] if stay else [*_DYING_WITH_PARENT, str(os.getpid())]), "-m", *command],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(name=name, pid=process.pid, started=psutil.Process(process.pid).create_time(), url=url)
    if stay:
        write_json(str(record_of(home, service.name)), asdict(service))
    return service


def await_healthy(service: Service, home: Path, health: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until a server answers at its path `health`.

    Raises:
        ServiceError: if it ends or does not answer in time; it is stopped then.
    """
    deadline = time.monotonic() + timeout_s
    log = _log(home, service.name)
    while time.monotonic() < deadline:
        if not service.running:
            raise ServiceError(f"{service.name} exited while starting; see {log}")
        if answers(f"{service.url}{health}"):
            return
        time.sleep(0.2)
    stop(service)
    raise ServiceError(f"{service.name} did not answer within {timeout_s:.0f} s; see {log}")


def answering(home: Path, name: str, health: str) -> Service | None:
    """Return the running server `name` if it answers at its path `health`, and stop it if it does not."""
    service = find(home, name)
    if service is None:
        return None
    try:
        await_healthy(service, home, health, timeout_s=_ANSWER_TIMEOUT_S)
    except ServiceError:
        return None
    return service


def answers(url: str | urllib.request.Request) -> bool:
    """Return whether an HTTP request succeeds within 5 seconds."""
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 (the address of a configured server)
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def free_port() -> int:
    """Return a free TCP port of the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def stop(service: Service) -> None:
    """End the service's process tree, as `end` does: Prefect's workers were seen to survive SIGTERM."""
    try:
        parent = psutil.Process(service.pid)
    except psutil.NoSuchProcess:
        return
    end([*parent.children(recursive=True), parent])


def end(processes: list[psutil.Process]) -> None:
    """End processes by SIGTERM, and those that still run after ten seconds by SIGKILL."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=_STOP_TIMEOUT_S)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=_STOP_TIMEOUT_S)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def record_of(home: Path, name: str) -> Path:
    """Return the path of the record of a permanent process."""
    return home / "services" / f"{name}.json"


def _log(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"
