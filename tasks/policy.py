"""What every stage's task has in common."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run

from imagerag.errors import UserError
from imagerag.locks import named_job
from imagerag.retrieval.store import Store
from imagerag.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")

_DAY_S = 24 * 3600


def stage(name: str, *, timeout_days: int = 1) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a function the Prefect task of one stage, which is ended after `timeout_days`.

    A retry continues what is unfinished, because every stage keeps its own markers; for the same reason Prefect's
    cache, which would be a second memory, is off.
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
    """Whether another try can help: not where the user has to mend something."""
    return not isinstance(state.data, UserError)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Log the user's mistake as what it is: a message."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError):
        record.msg, record.args, record.exc_info = str(error), (), None
    return True


@contextmanager
def alone_at(name: str) -> Iterator[None]:
    """Let one flow at a time bring the corpus `name` up to date, whatever deployment, command or machine it is of.

    Between its stages others would find rows that are on their way out and none yet in their place, and publish that.
    """
    logger = get_run_logger()
    with named_run(), Store(Settings().index_uri, name).update_lock(logger.info):
        yield


@contextmanager
def named_run() -> Iterator[None]:
    """Let others who have to wait for this flow be told which it is."""
    with named_job(f"{flow_run.flow_name} {flow_run.name}"):
        yield


def hide_user_tracebacks() -> None:
    """Have the running flow log a `UserError` without its traceback."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback)
