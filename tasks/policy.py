"""Retries, locks and logging that all stages share."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run

from imagerag.errors import UserError
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.locks import named_job

P = ParamSpec("P")
R = TypeVar("R")

_DAY_S = 24 * 3600


def stage(name: str, *, timeout_days: int = 1) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Return a decorator: it turns a function into the Prefect task of a stage, with a timeout of `timeout_days`.

    A retry continues unfinished work, because every stage stores its own completion markers. Prefect's cache is off,
    because it would duplicate them.
    """
    return task(
        name=name,
        retries=2,
        retry_delay_seconds=[10, 60],
        retry_condition_fn=_is_worth_retrying,
        timeout_seconds=timeout_days * _DAY_S,
        cache_policy=NO_CACHE,
    )


def _is_worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Return whether to retry: not after a `UserError`, which the user has to fix."""
    return not isinstance(state.data, UserError)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Log a `UserError` as its message, without a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError):
        record.msg, record.args, record.exc_info = str(error), (), None
    return True


@contextmanager
def alone_at(name: str) -> Iterator[None]:
    """Hold the update lock of the corpus `name`, which only one flow on any machine can have.

    Without it, another flow could publish the state between two stages: rows removed and not replaced yet.
    """
    logger = get_run_logger()
    with named_run(), Store(Settings().index_uri, name).update_lock(logger.info):
        yield


@contextmanager
def named_run() -> Iterator[None]:
    """Name the running flow in its locks, so that waiting jobs can log it."""
    with named_job(f"{flow_run.flow_name} {flow_run.name}"):
        yield


def hide_user_tracebacks() -> None:
    """Make the running flow log a `UserError` without its traceback."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback)
