"""What Prefect shows of a run: its name, and what the library logs in it."""

import logging

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.logging.handlers import APILogWorker
from prefect.runtime import flow_run

from flows import evaluate, features, finetune, ingest, pipeline, reindex

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("prefect_api_url")]


def test_the_librarys_log_is_in_the_runs() -> None:
    @flow(name="logs")
    def logs() -> str:
        logging.getLogger("imagerag.locks").warning("images is being written by another process")
        return str(flow_run.id)

    run_id = logs()
    APILogWorker.drain_all(timeout=30)
    with get_client(sync_client=True) as client:
        found = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])))
    assert ("imagerag.locks", "images is being written by another process") in [
        (log.name, log.message) for log in found
    ]


def test_a_runs_name_says_what_it_works_on() -> None:
    for module in (evaluate, features, finetune, ingest, reindex):
        name = module.__name__.rpartition(".")[2]
        assert getattr(module, name).flow_run_name == f"{name} {{parameters.name}}"
    assert pipeline.pipeline.flow_run_name == "pipeline {parameters.corpus.name}"
