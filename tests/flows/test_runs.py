"""What Prefect shows of a run: its name, what the library logs in it, and which runs wait for each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.concurrency.sync import concurrency
from prefect.flow_engine import run_flow

from flows import evaluate, features, finetune, ingest, pipeline, reindex
from tasks.slots import COMPUTE_SLOTS, compute_slot, prepare_slots

LOGGING = """
import logging
from prefect import flow
from prefect.runtime import flow_run

@flow(name="logs")
def logs():
    logging.getLogger("imagerag.storage.locks").warning("images is being written by another process")
    return flow_run.id

print(logs())
"""


@pytest.mark.engines
def test_the_librarys_log_is_in_the_runs(prefect_api_url: str) -> None:
    """In a process of its own: Prefect reads which loggers there are when it is first imported."""
    environment = os.environ | {"PREFECT_API_URL": prefect_api_url}
    done = subprocess.run([sys.executable, "-c", LOGGING], env=environment, capture_output=True, text=True, check=True)
    with get_client(sync_client=True) as client:
        found = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[done.stdout.split()[-1]])))
    assert ("imagerag.storage.locks", "images is being written by another process") in [
        (log.name, log.message) for log in found
    ]


def test_a_runs_name_says_what_it_works_on() -> None:
    for module in (evaluate, features, finetune, ingest, pipeline, reindex):
        name = module.__name__.rpartition(".")[2]
        assert getattr(module, name).flow_run_name == f"{name} {{name}}"


@pytest.mark.engines
@pytest.mark.usefixtures("prefect_api_url")
def test_one_slot_is_taken_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def num_taken() -> tuple[int, int]:
        with get_client(sync_client=True) as client:
            limit = client.read_global_concurrency_limit_by_name(COMPUTE_SLOTS)
        return limit.active_slots, limit.limit

    @flow
    def holds_the_slot() -> None:
        with compute_slot():
            assert num_taken() == (1, 1)
            with pytest.raises(TimeoutError), concurrency(COMPUTE_SLOTS, timeout_seconds=1):
                pass

    holds_the_slot()
    assert num_taken() == (0, 1)
    try:
        with get_client(sync_client=True) as client:
            monkeypatch.setenv("IMAGERAG_COMPUTE_SLOTS", "2")
            assert prepare_slots(client).limit == 2
            monkeypatch.delenv("IMAGERAG_COMPUTE_SLOTS")
            assert prepare_slots(client).limit == 2, "what is set there stays"
    finally:
        with get_client(sync_client=True) as client:
            client.delete_global_concurrency_limit_by_name(COMPUTE_SLOTS)


@pytest.mark.engines
@pytest.mark.usefixtures("prefect_api_url")
def test_a_scheduled_run_that_fails_has_its_tag_and_is_on_the_corpus_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path))
    edited = {"name": "failing", "portable": {"__prefect_kind": "json", "value": "true"}}
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(evaluate.evaluate, parameters=edited)
        state = run_flow(evaluate.evaluate, flow_run=run, return_type="state")
        assert state.is_failed()
        assert "failing" in state.message, "nothing was trained on it"
        run = client.read_flow_run(run.id)
        assert (run.name, run.tags) == ("evaluate failing", ["corpus:failing"])
        (page,) = [each.data for each in client.read_artifacts() if each.key == "status-failing"]
    assert "nothing: there is no table yet" in page
    assert "| Failed |" in page.partition("[evaluate failing]")[2]
