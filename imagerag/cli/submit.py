"""`imagerag submit`: a command as a job of a Ray cluster, by Ray's Jobs API."""

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
"""How long the cluster may be out of reach, and a stopped job take to end."""


def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="A program and its arguments: -- imagerag ingest URLS.")
    ],
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard: http://host:8265.")
    ],
    job_id: Annotated[
        str | None,
        typer.Option(
            "--id",
            envvar="PREFECT__FLOW_RUN_ID",
            help="Names the job. One of this name that still runs is followed, not started again.",
        ),
    ] = None,
) -> None:
    """Run a command on a Ray cluster that this machine has not joined, and follow it to its end.

    What it writes is shown as it comes. Ctrl-C and a cancelled flow run stop it. Settings (IMAGERAG_...) go along, but
    for this machine's own; files have to be where the cluster finds them, and credentials are those of its nodes.
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
    """Return the exit status of the command."""
    name = job_id or f"imagerag-{secrets.token_hex(8)}"  # chosen here, so that the job can be stopped at any moment
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
    """Have a job of this name run the command, unless one does already."""
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
            # A dashboard that has just started knows no node yet.
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise UserError(f"Ray takes no job: {error}") from error
            time.sleep(1)
        else:
            return


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep signals back until Ray has answered: a request that is given up may still start a job."""
    held = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)


def _follow(client: "JobSubmissionClient", name: str) -> None:
    """Show what the job writes until it ends, whatever becomes of the connection meanwhile."""
    import asyncio

    num_shown, last_heard = 0, time.monotonic()

    async def show() -> None:
        nonlocal num_shown, last_heard
        position = 0  # a new connection begins with what was shown before
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
