"""`imagerag submit`: run a command as a job on a Ray cluster, with Ray's Jobs API."""

import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from imagerag.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_FORWARDED = ("PREFECT_API_URL", "PREFECT__FLOW_RUN_ID")
_OF_THIS_MACHINE = ("IMAGERAG_HOME", "IMAGERAG_RAY_ADDRESS")
_PATIENCE_S = 60.0
"""Maximum time without a connection to the cluster, and for a stopped job to end."""


def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="Program with its arguments: -- imagerag ingest URLS.")
    ],
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="URL of the cluster's dashboard: http://host:8265.")
    ],
    job_id: Annotated[
        str | None,
        typer.Option(
            "--id",
            envvar="PREFECT__FLOW_RUN_ID",
            help="Id of the job. A running job with this id is followed instead of started again.",
        ),
    ] = None,
) -> None:
    """Run a command as a job on a Ray cluster that this machine is not part of, and follow it until it ends.

    The job's output is streamed. Ctrl-C or cancelling the flow run stops it. IMAGERAG_... settings are passed on,
    except IMAGERAG_HOME and IMAGERAG_RAY_ADDRESS; files must be accessible to the cluster, and credentials set on its
    nodes.
    """
    client = _connect(address)
    try:
        status = _run(client, command, job_id)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Ray at {address} does not answer as it should: {error}. A job that it has may go on"
        ) from error
    raise typer.Exit(status)


def _run(client: "JobSubmissionClient", command: list[str], job_id: str | None) -> int:
    """Run or follow the job, and return the exit status of its command."""
    name = job_id or f"imagerag-{secrets.token_hex(8)}"  # chosen here, to stop the job at any time
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _start(client, command, name)
        _follow(client, name)
    except KeyboardInterrupt:
        if any(job.submission_id == name for job in client.list_jobs()):
            typer.echo(f"stopping job {name} ...", err=True)
            client.stop_job(name)
            _await_end(client, name)
        return 130
    info = client.get_job_info(name)
    if info.status == "SUCCEEDED":
        return 0
    typer.echo(f"job {name}: {info.status.lower()}: {info.message}", err=True)
    return info.driver_exit_code or 1


def _connect(address: str) -> "JobSubmissionClient":
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address must be the http:// or https:// URL of Ray's dashboard, got {address!r}")
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"Ray at {address} asks for its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(f"there is no Ray dashboard to submit jobs to at {address}: {error}") from error


def _start(client: "JobSubmissionClient", command: list[str], name: str) -> None:
    """Start a job with this id, unless it runs already."""
    if known := [job for job in client.list_jobs() if job.submission_id == name]:
        if not known[0].status.is_terminal():
            typer.echo(f"following job {name}, which runs already", err=True)
            return
        client.delete_job(name)
    forwarded = {
        name: value
        for name, value in os.environ.items()
        if name in _FORWARDED or (name.startswith("IMAGERAG_") and name not in _OF_THIS_MACHINE)
    }
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with _uninterrupted():
                client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=name,
                    runtime_env={"env_vars": forwarded | {"IMAGERAG_RAY_ADDRESS": "auto", "PYTHONUNBUFFERED": "1"}},
                )
        except RuntimeError as error:
            # A dashboard that has just started has no nodes yet.
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise UserError(f"Ray takes no job: {error}") from error
            time.sleep(1)
        else:
            return


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Defer signals until Ray has answered, because an abandoned request may still start a job.

    Blocking them would not do: the kernel hands a blocked signal to another thread of the process.
    """
    arrived: list[int] = []

    def note(number: int, _: object) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            raise KeyboardInterrupt


def _follow(client: "JobSubmissionClient", name: str) -> None:
    """Stream the job's output until it ends, and reconnect if the connection is lost."""
    import asyncio

    num_shown, last_heard = 0, time.monotonic()

    async def show() -> None:
        nonlocal num_shown, last_heard
        position = 0  # a new connection repeats the output from its start
        async for text in client.tail_job_logs(name):
            sys.stdout.write(text[max(0, num_shown - position) :])
            sys.stdout.flush()
            position += len(text)
            num_shown, last_heard = max(num_shown, position), time.monotonic()

    while True:
        try:
            asyncio.run(show())
            if client.get_job_status(name).is_terminal():
                return
            last_heard = time.monotonic()
        except (OSError, RuntimeError) as error:
            if time.monotonic() - last_heard > _PATIENCE_S:
                raise UserError(
                    f"Ray's dashboard has been out of reach for {_PATIENCE_S:.0f} s: {error}. The job may go on: "
                    f"follow it by --id {name}"
                ) from error
        time.sleep(1)


def _await_end(client: "JobSubmissionClient", name: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not client.get_job_status(name).is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"job {name} was told to stop, and still runs after {_PATIENCE_S:.0f} s")
        time.sleep(0.5)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
