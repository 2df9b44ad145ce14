"""MLflow comes and goes; the training goes on."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from imagerag.errors import UserError
from imagerag.processes import free_port
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.files import write_json
from imagerag.training import tracking
from imagerag.training.tracking import MlflowTracker, lasting_run, log_index, mlflow_client, start_run, tracking_uri


def serve(folder: Path, port: int) -> subprocess.Popen[bytes]:
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers",
         "1", "--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port)],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # as `imagerag up` does
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.5)
    raise AssertionError("MLflow did not start")


def kill(server: subprocess.Popen[bytes]) -> None:
    import psutil

    for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
        process.kill()
    server.wait()


@pytest.mark.engines
def test_a_server_that_is_lost_and_comes_back_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_RETRY_AFTER_S", 0.5)
    port = free_port()
    server = serve(tmp_path, port)
    settings = Settings(home=tmp_path, mlflow_tracking_uri=f"http://127.0.0.1:{port}")
    try:
        run_id = start_run(settings, "test", "run", {"rate": 0.1}, {"digest": "abc"})
        tracker = MlflowTracker(tracking_uri(settings), run_id)
        tracker.metrics({"loss": 3.0}, 0)
        while tracker._waiting.qsize():
            time.sleep(0.05)
        kill(server)
        started = time.perf_counter()
        for step in range(1, 20):
            tracker.metrics({"loss": 3.0 / step}, step)
        tracker.image("grid.png", Image.new("RGB", (8, 8)))
        assert time.perf_counter() - started < 1, "nobody waits for MLflow"
        time.sleep(1.5)
        server = serve(tmp_path, port)
        tracker.close()
        client = tracker._client
        assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == list(range(20))
        assert [file.path for file in client.list_artifacts(run_id)] == ["grid.png"]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert caplog.text.count("MLflow can't be reached; entries are queued") == 1
    finally:
        kill(server)


def test_one_that_never_comes_back_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_LEFT_AT_END_S", 1.0)
    tracker = MlflowTracker(f"http://127.0.0.1:{free_port()}", "no run")
    for step in range(3):
        tracker.metrics({"loss": 1.0}, step)
    tracker.close()
    assert "MLflow could not be reached again" in caplog.text


def test_what_is_flushed_is_there_even_if_the_process_ends(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    run_id = start_run(settings, "test", "run", {})
    tracker = MlflowTracker(tracking_uri(settings), run_id)
    for step in range(30):
        tracker.metrics({"loss": 3.0 - step / 30}, step)
    tracker.flush()
    assert len(mlflow_client(tracking_uri(settings)).get_metric_history(run_id, "loss")) == 30
    tracker.close()


def test_nobody_waits_for_a_server_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_FLUSH_S", 60.0)
    tracker = MlflowTracker(f"http://127.0.0.1:{free_port()}", "no run")
    started = time.monotonic()
    tracker.flush()
    assert time.monotonic() - started < 30


def test_what_mlflow_refuses_is_dropped_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_LEFT_AT_END_S", 30.0)
    settings = Settings(home=tmp_path)
    run_id = start_run(settings, "test", "run", {})
    tracker = MlflowTracker(tracking_uri(settings), run_id)
    for step in range(3):
        tracker.metrics({"loss/": 1.0}, step)
        tracker.metrics({"loss": 1.0}, step)
    tracker.close()
    client = mlflow_client(tracking_uri(settings))
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == [0, 1, 2]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert caplog.text.count("MLflow refuses an entry of the run") == 1
    assert 'Invalid value "loss/"' in caplog.text
    assert "reached" not in caplog.text


@pytest.mark.parametrize(
    ("is_deleted", "fault"), [(True, "must be in the 'active' state"), (False, f"Run with id={'0' * 32} not found")]
)
def test_a_run_that_is_gone_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_deleted: bool, fault: str
) -> None:
    monkeypatch.setattr(tracking, "_LEFT_AT_END_S", 30.0)
    settings = Settings(home=tmp_path)
    run_id = start_run(settings, "test", "run", {})
    mlflow_client(tracking_uri(settings)).delete_run(run_id)
    tracker = MlflowTracker(tracking_uri(settings), run_id if is_deleted else "0" * 32)
    tracker.metrics({"loss": 1.0}, 0)
    tracker.close()
    assert not tracker._thread.is_alive()
    assert caplog.text.count("MLflow refuses an entry of the run") == 1
    assert fault in caplog.text
    assert "reached" not in caplog.text


def test_one_that_is_not_there_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"MLflow at {uri} can't be used"):
        start_run(Settings(home=tmp_path, mlflow_tracking_uri=uri), "test", "run", {})


def test_a_run_has_the_versions_of_its_index_as_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, store = Settings(home=tmp_path), Store("s3://bucket/index", "mine")
    run_id = start_run(settings, "test", "run", {})
    for version, context in (3, "training"), (3, "training"), (4, "retrieval"):
        log_index(settings, run_id, store, version, context)
    inputs = mlflow_client(tracking_uri(settings)).get_run(run_id).inputs.dataset_inputs
    named = {each.dataset.name: (json.loads(each.dataset.source), each.tags[0].value) for each in inputs}
    assert len(inputs) == 2
    assert named == {
        "mine-v3": ({"uri": "s3://bucket/index/mine.lance", "version": 3}, "training"),
        "mine-v4": ({"uri": "s3://bucket/index/mine.lance", "version": 4}, "retrieval"),
    }
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"MLflow at {uri} can't be used"):
        log_index(Settings(home=tmp_path, mlflow_tracking_uri=uri), run_id, store, 3, "training")


def test_runs_of_a_group_are_nested(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    runs = [start_run(settings, "test", name, {}, group="ablations") for name in ("a", "b")]
    client = MlflowTracker(tracking_uri(settings), runs[0])._client
    parents = {client.get_run(run).data.tags["mlflow.parentRunId"] for run in runs}
    (parent,) = parents
    assert client.get_run(parent).info.run_name == "ablations"
    assert len(client.search_runs(["1"])) == 3


def test_a_run_is_gone_on_with(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    own = (str(tmp_path / "runs" / "a.json"), settings, "test", "run", {"rate": 0.1}, {})
    run_id = lasting_run(*own)
    MlflowTracker(tracking_uri(settings), run_id).close("FAILED")
    assert lasting_run(*own) == run_id
    client = MlflowTracker(tracking_uri(settings), run_id)._client
    assert client.get_run(run_id).info.status == "RUNNING"
    assert len(client.search_runs(["1"])) == 1


def test_a_run_that_was_lost_has_one_successor(tmp_path: Path) -> None:
    """As after MLflow's database was restored from a backup."""
    settings = Settings(home=tmp_path)
    path = str(tmp_path / "runs" / "a.json")
    write_json(path, {"run_id": "0" * 32})
    own = (settings, "test", "run", {"rate": 0.1}, {})
    run_id = lasting_run(path, *own)
    assert lasting_run(path, *own) == run_id
    assert start_run(*own, run_id="0" * 32) == run_id
    client = MlflowTracker(tracking_uri(settings), run_id)._client
    assert client.get_run(run_id).data.tags["imagerag.continues"] == "0" * 32
    client.delete_run(run_id)
    assert lasting_run(path, *own) != run_id, "nor is one that was deleted gone on with"
