"""The engines that run beside a flow on one machine: Prefect server and worker, MLflow, on loopback, one set a home.

`up` starts them to stay, `prefect_server` lends one for the duration of a run. Either keeps its database, logs and
process records under `home`, so that two homes on one machine never meet. They ask for the home's password, because
other users of the machine and pages of any site reach ports of loopback too, and who drives Prefect can run code.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import psutil

from imagerag import credentials
from imagerag.errors import UserError
from imagerag.locks import writer_lock
from imagerag.settings import Settings

WORK_POOL = "imagerag"
LOGIN_PATH = "/imagerag/login"
"""A page of our Prefect server that keeps what stands behind its `#`, the password, as Prefect's own login does."""
PREFECT, WORKER, MLFLOW = "prefect-server", "prefect-worker", "mlflow-server"

_HEALTH = {PREFECT: "/api/health", MLFLOW: "/health"}
_PROJECT = "IMAGERAG_PROJECT"
"""Tells workers where the flows are. Nothing else has it, and so flow runs' processes are known by it."""

_START_TIMEOUT_S = 180.0
_ANSWER_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
# Has the kernel end this process when its parent is killed, so that kill -9 leaves no server behind (Linux; 1 is
# PR_SET_PDEATHSIG). It is done after the fork by the child itself, because Popen's hook for it is unsafe with threads.
_DYING_WITH_PARENT = (
    "-c",
    "import ctypes, os, signal, sys; "
    "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
)


class ServiceError(RuntimeError):
    """A server did not start, or does not answer."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A process that this home started, known again by its process id and start time."""

    name: str
    pid: int
    started: float
    url: str

    @property
    def running(self) -> bool:
        """Whether exactly this process still runs: a process id alone may have been given out again."""
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


def prefect_environment(settings: Settings, api_url: str | None = None) -> dict[str, str]:
    """Environment variables that give Prefect its place under the home, and no telemetry.

    Where the settings name no server, they have the password of the home's own as well.
    """
    home = settings.make_home()  # Prefect makes no folder above its own
    environment = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "DO_NOT_TRACK": "1",
        # In memory, which is the default, a restart of the server forgets who holds a slot, and it is never free again.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # Without heartbeats nobody learns that a flow run's process was killed.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        # What the library logs is in the run's log; what it logs outside of a run is not Prefect's to complain of.
        "PREFECT_LOGGING_EXTRA_LOGGERS": "imagerag",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        # Server start-up takes longer than Prefect's 20 s on a small, busy machine.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(int(_START_TIMEOUT_S)),
    }
    if settings.prefect_api_url is None:
        environment["PREFECT_API_AUTH_STRING"] = _prefect_login(home)
    return environment | ({"PREFECT_API_URL": api_url} if api_url else {})


def _prefect_login(home: Path) -> str:
    return f"{credentials.USER}:{credentials.password(home)}"


def link(server: Service, home: Path) -> str:
    """Return the address of Prefect's UI that logs a browser in."""
    return f"{server.url}{LOGIN_PATH}#{quote(_prefect_login(home))}"


@contextmanager
def prefect_server(settings: Settings) -> Iterator[str]:
    """Yield a Prefect server's API URL: of the settings', of `up`'s, else of one that ends with the block."""
    if settings.prefect_api_url is not None:
        yield settings.prefect_api_url
        return
    service = find(settings.home, PREFECT)
    if service is not None:
        _await_healthy(service, settings.home)  # it may be starting
        yield f"{service.url}/api"
        return
    service = _start_server(settings, stay=False)
    try:
        yield f"{service.url}/api"
    finally:
        _stop(service)


def find(home: Path, name: str) -> Service | None:
    """The running service `name` of this home, if there is one."""
    try:
        service = Service(**json.loads(_record(home, name).read_text()))
    except FileNotFoundError:
        return None
    return service if service.running else None


def up(settings: Settings, project: Path) -> tuple[Service, ...]:
    """Start a Prefect server, a worker and an MLflow server to stay, and deploy all flows.

    What runs and answers already is left as it is, and what was started by another `up` at the same time is found. A
    server that the settings give the address of is not started.

    Args:
        settings: its home holds the engines' state.
        project: The folder of the flows and of `infra/prefect.yaml`.

    Raises:
        UserError: if `project` has no `infra/prefect.yaml`.
    """
    deployments_file(project)
    home = settings.make_home()
    with _changing(home):
        mlflow = None if settings.mlflow_tracking_uri else _answering(home, MLFLOW) or _start_mlflow(settings)
        server = None if settings.prefect_api_url else _answering(home, PREFECT) or _start_server(settings, stay=True)
        api_url = settings.prefect_api_url if server is None else f"{server.url}/api"
        assert api_url is not None
        environment = prefect_environment(settings, api_url) | {"IMAGERAG_HOME": str(home), _PROJECT: str(project)}
        _deploy(environment)
        worker = find(home, WORKER)
        if worker is None:
            command = ("prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process")
            worker = _start(home, WORKER, command, environment, url=api_url, stay=True)
        if mlflow is not None:
            _await_healthy(mlflow, home)
        return tuple(each for each in (server, worker, mlflow) if each is not None)


def deployments_file(project: Path) -> Path:
    """Return where a project describes its deployments.

    Raises:
        UserError: if it does not.
    """
    path = project / "infra" / "prefect.yaml"
    if not path.is_file():
        raise UserError(f"the deployments are described in {path}, which does not exist; run from a checkout")
    return path


def down(home: Path) -> list[Service]:
    """Stop what `up` started, with everything below it, flow runs included; returns which services were running."""
    stopped = []
    with _changing(home):
        for name in (WORKER, PREFECT, MLFLOW):
            service = find(home, name)
            if service is not None:
                _stop(service)
                stopped.append(service)
            _record(home, name).unlink(missing_ok=True)
            if name == WORKER:
                _end(list(_flow_run_processes(home)))
    return stopped


@contextmanager
def _changing(home: Path) -> Iterator[None]:
    """Keep other processes from starting or stopping services of this home at the same time."""
    with writer_lock(str(home / "services"), "services"):
        yield


def _answering(home: Path, name: str) -> Service | None:
    """The running service `name`, if it answers; one that does not is stopped."""
    service = find(home, name)
    if service is None:
        return None
    try:
        _await_healthy(service, home, timeout_s=_ANSWER_TIMEOUT_S)
    except ServiceError:
        return None
    return service


def _flow_run_processes(home: Path) -> Iterator[psutil.Process]:
    """All processes that a worker of this home started, Ray's included, also where the worker itself was killed."""
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if process.pid != os.getpid() and _PROJECT in environment and environment.get("IMAGERAG_HOME") == str(home):
            yield process


def answers(url: str | urllib.request.Request) -> bool:
    """Whether an HTTP request succeeds within seconds."""
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 (the address of a configured server)
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _start_server(settings: Settings, *, stay: bool) -> Service:
    home, port = settings.home, free_port()
    url = f"http://127.0.0.1:{port}"
    environment = prefect_environment(settings, f"{url}/api") | {
        "PREFECT_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_API_AUTH_STRING": _prefect_login(home),
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": url,
    }
    service = _start(home, PREFECT, ("imagerag.prefect_app", str(port)), environment, url=url, stay=stay)
    _await_healthy(service, home)
    return service


def _start_mlflow(settings: Settings) -> Service:
    """Start an MLflow server on the database that runs without a server write to as well. It is not awaited."""
    from imagerag.training.tracking import tracking_uri

    home, port = settings.home, free_port()
    folder = home / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    users = folder / "auth.ini"
    database = str(folder / "auth.db").replace("%", "%%")  # which configparser would interpolate
    users.write_text(f"[mlflow]\ndatabase_uri = sqlite:///{database}\ndefault_permission = NO_PERMISSIONS\n")
    url = f"http://127.0.0.1:{port}"
    command = (
        "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--app-name", "basic-auth",
        "--backend-store-uri", tracking_uri(settings), "--artifacts-destination", (folder / "artifacts").as_uri(),
        "--allowed-hosts", f"127.0.0.1:{port},localhost:{port}", "--cors-allowed-origins", url,
    )  # fmt: skip
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_AUTH_CONFIG_PATH": str(users),
        "MLFLOW_AUTH_ADMIN_USERNAME": credentials.USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": credentials.password(home),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": credentials.password(home),  # of the UI's forms
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # it starts others by name
    }
    return _start(home, MLFLOW, command, environment, url=url, stay=True)


def _start(
    home: Path, name: str, command: tuple[str, ...], environment: Mapping[str, str], *, url: str, stay: bool
) -> Service:
    log = _log(home, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *([] if stay else _DYING_WITH_PARENT), "-m", *command],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(name=name, pid=process.pid, started=psutil.Process(process.pid).create_time(), url=url)
    if stay:
        _write_record(home, service)
    return service


def _await_healthy(service: Service, home: Path, timeout_s: float = _START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    log = _log(home, service.name)
    while time.monotonic() < deadline:
        if not service.running:
            raise ServiceError(f"{service.name} ended while starting; its log is {log}")
        if answers(f"{service.url}{_HEALTH[service.name]}"):
            return
        time.sleep(0.2)
    _stop(service)
    raise ServiceError(f"{service.name} did not answer within {timeout_s:.0f} s; its log is {log}")


def _stop(service: Service) -> None:
    """End the service's process tree: ask first, then kill, because Prefect's workers were seen to outlive SIGTERM."""
    try:
        parent = psutil.Process(service.pid)
    except psutil.NoSuchProcess:
        return
    _end([*parent.children(recursive=True), parent])


def _end(processes: list[psutil.Process]) -> None:
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


def _deploy(environment: Mapping[str, str]) -> None:
    """Run `imagerag deploy` in a process of its own: Prefect reads its settings when it is first imported."""
    command = [sys.executable, "-m", "imagerag.cli", "deploy"]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"`imagerag deploy` failed:\n{result.stdout}{result.stderr}")


def _record(home: Path, name: str) -> Path:
    return home / "services" / f"{name}.json"


def _log(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"


def _write_record(home: Path, service: Service) -> None:
    path = _record(home, service.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(service)))
    draft.replace(path)
