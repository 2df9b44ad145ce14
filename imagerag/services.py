"""Local servers of a home, on loopback: Prefect server and worker, and MLflow.

`up` starts them permanently; `prefect_server` starts a temporary Prefect server for one run. Databases, logs and
process records are under `home`, so that homes on one machine do not interfere. The servers require the home's
password: other users of the machine and web pages can reach loopback ports too, and whoever controls Prefect can run
code.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

import psutil

from imagerag import credentials
from imagerag.errors import UserError
from imagerag.processes import (
    START_TIMEOUT_S,
    Service,
    answering,
    await_healthy,
    end,
    find,
    free_port,
    record_of,
    start,
    stop,
)
from imagerag.settings import Settings
from imagerag.storage.locks import writer_lock

WORK_POOL = "imagerag"
LOGIN_PATH = "/imagerag/login"
"""Page of our Prefect server that stores the password from its URL fragment, as Prefect's own login does."""
PREFECT, WORKER, MLFLOW = "prefect-server", "prefect-worker", "mlflow-server"

_DISTRIBUTION = "imagerag-turbo"
_HEALTH = {PREFECT: "/api/health", MLFLOW: "/health"}
_PROJECT = "IMAGERAG_PROJECT"
"""Environment variable with the flows' folder. Only workers and their flow runs have it, which identifies them."""


def prefect_environment(settings: Settings, api_url: str | None = None) -> dict[str, str]:
    """Return environment variables that keep Prefect's state under the home and disable telemetry.

    They include the home's password unless the settings name another Prefect server.
    """
    home = settings.make_home()  # Prefect does not create parent folders
    environment = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "DO_NOT_TRACK": "1",
        # With the default, in memory, a restarted server forgets who holds a slot, which then stays taken.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # Heartbeats let the server notice that a flow run's process was killed.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        # The library's messages go to the run's log; outside of a run, Prefect shall not warn about them.
        "PREFECT_LOGGING_EXTRA_LOGGERS": "imagerag",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        # Server start-up takes longer than Prefect's 20 s on a small, busy machine.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(int(START_TIMEOUT_S)),
    }
    if settings.prefect_api_url is None:
        environment["PREFECT_API_AUTH_STRING"] = _prefect_login(home)
    return environment | ({"PREFECT_API_URL": api_url} if api_url else {})


def _prefect_login(home: Path) -> str:
    return f"{credentials.USER}:{credentials.password(home)}"


def link(server: Service, home: Path) -> str:
    """Return the URL that opens Prefect's UI and logs the browser in."""
    return f"{server.url}{LOGIN_PATH}#{quote(_prefect_login(home))}"


@contextmanager
def prefect_server(settings: Settings) -> Iterator[str]:
    """Yield the API URL of the configured server, of the one `up` started, or of a temporary one for this block."""
    if settings.prefect_api_url is not None:
        yield settings.prefect_api_url
        return
    service = find(settings.home, PREFECT)
    if service is not None:
        await_healthy(service, settings.home, _HEALTH[PREFECT])  # it may be starting
        yield f"{service.url}/api"
        return
    service = _start_server(settings, stay=False)
    try:
        yield f"{service.url}/api"
    finally:
        stop(service)


def prefect_api(settings: Settings) -> str | None:
    """Return the API's URL of a Prefect server that runs: of the settings', else of `up`'s."""
    server = find(settings.home, PREFECT)
    return settings.prefect_api_url or (f"{server.url}/api" if server else None)


def mlflow_link(settings: Settings, page: str) -> str | None:
    """Return the address of a page of MLflow's UI, if there is a server: of the settings', else of `up`'s."""
    server = find(settings.home, MLFLOW)
    url = settings.mlflow_tracking_uri or (server.url if server else None)
    return f"{url}/#/{page}" if url else None


def up(settings: Settings, project: Path) -> tuple[Service, ...]:
    """Start a Prefect server, a worker and an MLflow server permanently, and deploy all flows.

    Services that already run and answer are left alone, including those of a concurrent `up`. A server whose URL is in
    the settings is not started.

    Args:
        settings: the home that holds the services' state, and URLs of other servers.
        project: the folder that holds `flows/` and `infra/prefect.yaml`.

    Raises:
        UserError: if there is no `infra/prefect.yaml`, see `deployments_file`.
    """
    deployments_file(project)
    home = settings.make_home()
    with _changing(home):
        mlflow = server = None
        if settings.mlflow_tracking_uri is None:
            mlflow = answering(home, MLFLOW, _HEALTH[MLFLOW]) or _start_mlflow(settings)
        if settings.prefect_api_url is None:
            server = answering(home, PREFECT, _HEALTH[PREFECT]) or _start_server(settings, stay=True)
        api_url = settings.prefect_api_url if server is None else f"{server.url}/api"
        assert api_url is not None
        environment = prefect_environment(settings, api_url) | {"IMAGERAG_HOME": str(home), _PROJECT: str(project)}
        _deploy(environment)
        worker = find(home, WORKER)
        if worker is None:
            command = ("prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process")
            worker = start(home, WORKER, command, environment, url=api_url, stay=True)
        if mlflow is not None:
            await_healthy(mlflow, home, _HEALTH[MLFLOW])
        return tuple(each for each in (server, worker, mlflow) if each is not None)


def deployments_file(project: Path) -> Path:
    """Return the path of a checkout's `infra/prefect.yaml`, or of the one that was installed with a wheel.

    Raises:
        UserError: if it does not exist.
    """
    path = project / "infra" / "prefect.yaml"
    if path.is_file():
        return path
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files(_DISTRIBUTION) or ():
            if file.name == path.name:
                return Path(str(file.locate()))
    raise UserError(f"the deployments are described in {path}, which does not exist: install {_DISTRIBUTION} again")


def down(home: Path) -> list[Service]:
    """Stop what `up` started, with all child processes and flow runs; return the services that were running."""
    stopped = []
    with _changing(home):
        for name in (WORKER, PREFECT, MLFLOW):
            service = find(home, name)
            if service is not None:
                stop(service)
                stopped.append(service)
            record_of(home, name).unlink(missing_ok=True)
            if name == WORKER:
                end(list(_flow_run_processes(home)))
    return stopped


@contextmanager
def _changing(home: Path) -> Iterator[None]:
    """Hold the lock for starting and stopping services of this home."""
    with writer_lock(str(home / "services"), "services"):
        yield


def _flow_run_processes(home: Path) -> Iterator[psutil.Process]:
    """Yield all processes that a worker of this home started, Ray's included, even if the worker was killed."""
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if process.pid != os.getpid() and _PROJECT in environment and environment.get("IMAGERAG_HOME") == str(home):
            yield process


def _start_server(settings: Settings, *, stay: bool) -> Service:
    home, port = settings.home, free_port()
    url = f"http://127.0.0.1:{port}"
    environment = prefect_environment(settings, f"{url}/api") | {
        "PREFECT_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_API_AUTH_STRING": _prefect_login(home),
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": url,
    }
    service = start(home, PREFECT, ("imagerag.prefect_app", str(port)), environment, url=url, stay=stay)
    await_healthy(service, home, _HEALTH[PREFECT])
    return service


def _start_mlflow(settings: Settings) -> Service:
    """Start an MLflow server on the home's database, which runs also use directly. Does not wait for it to answer."""
    from imagerag.training.databases import ARTIFACTS, users_database
    from imagerag.training.tracking import tracking_uri

    home, port = settings.home, free_port()
    database = str(users_database(home)).replace("%", "%%")  # configparser would interpolate a single %
    users = home / "mlflow" / "auth.ini"
    users.write_text(f"[mlflow]\ndatabase_uri = sqlite:///{database}\ndefault_permission = NO_PERMISSIONS\n")
    url = f"http://127.0.0.1:{port}"
    command = (
        "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--app-name", "basic-auth",
        "--backend-store-uri", tracking_uri(settings), "--artifacts-destination", (home / ARTIFACTS).as_uri(),
        "--allowed-hosts", f"127.0.0.1:{port},localhost:{port}", "--cors-allowed-origins", url,
    )  # fmt: skip
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_AUTH_CONFIG_PATH": str(users),
        "MLFLOW_AUTH_ADMIN_USERNAME": credentials.USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": credentials.password(home),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": credentials.password(home),  # signs the UI's forms
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # it runs programs by name
    }
    return start(home, MLFLOW, command, environment, url=url, stay=True)


def _deploy(environment: Mapping[str, str]) -> None:
    """Run `imagerag deploy` in a subprocess, because Prefect reads its settings when it is first imported."""
    command = [sys.executable, "-m", "imagerag.cli", "deploy"]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"`imagerag deploy` failed:\n{result.stdout}{result.stderr}")
