"""Run a flow in this process, against the home's Prefect server."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from imagerag.errors import UserError

if TYPE_CHECKING:
    from imagerag.config import Config
    from imagerag.settings import Settings


FlowName = Literal["ingest", "reindex", "features", "finetune", "evaluate", "pipeline"]


def run_flow(flow: FlowName, given: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Validate the parameters, run a flow, and return its report.

    Args:
        flow: name of the flow.
        given: its parameters.
        defaults: parameters that replace the flow's defaults where none are given.

    Raises:
        UserError: if a parameter is invalid, before anything is started.
    """
    from imagerag.config import validated
    from imagerag.services import prefect_environment
    from imagerag.settings import Settings

    settings = Settings()
    # Prefect reads its settings when it is first imported.
    os.environ.update(prefect_environment(settings))
    run = load_flow(flow)
    parameters = validated(parameters_of(flow), merged(defaults, given))
    with prefect_session(settings):
        return run(**dict(parameters))


def load_flow(flow: FlowName) -> Any:
    """Return a flow."""
    from importlib import import_module

    from imagerag.cli.project import project

    project()  # checks that `flows` is this project's package
    return getattr(import_module(f"flows.{flow}"), flow)


def parameters_of(flow: FlowName) -> "type[Config]":
    """Return the model of a flow's parameters, without importing Prefect."""
    from imagerag.cli.project import project

    project()  # checks that `flows` is this project's package
    from flows.parameters import PARAMETERS

    return PARAMETERS[flow]


@contextmanager
def prefect_session(settings: "Settings") -> Iterator[str]:
    """Connect flows in the block to the home's Prefect server, and yield its API URL."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from imagerag.services import prefect_server

    with prefect_server(settings) as api_url, temporary_settings({PREFECT_API_URL: api_url}):
        try:
            yield api_url
        finally:
            # Send queued logs and events before the server stops; otherwise Prefect retries for a minute at exit.
            APILogWorker.drain_all(timeout=10)
            EventsWorker.drain_all(timeout=10)


def read_parameters(path: Path) -> dict[str, Any]:
    """Return the parameters in a JSON file.

    Raises:
        UserError: if it can't be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--parameters has to be a readable JSON file; {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--parameters has to hold a JSON object; {path} holds {type(values).__name__}")
    return values


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of both; where both have one, that of `over`."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
