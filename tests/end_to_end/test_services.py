"""`imagerag up` and `down`, and the server that is lent for a run, with a real Prefect."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from imagerag import services
from imagerag.errors import UserError
from imagerag.settings import Settings
from imagerag.training.tracking import start_run

ROOT = Path(__file__).parent.parent.parent


def _listening_addresses(pid: int) -> set[str]:
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    found = [connection for process in tree for connection in process.net_connections("tcp")]
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


def _deployments(url: str) -> set[str]:
    request = urllib.request.Request(
        f"{url}/api/deployments/filter", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return {deployment["name"] for deployment in json.load(response)}


@pytest.mark.engines
def test_up_deploys_every_flow_on_loopback_and_down_ends_everything(tmp_path: Path) -> None:
    try:
        settings = Settings(home=tmp_path)
        server, worker, mlflow = services.up(settings, project=ROOT)
        assert services.answers(f"{server.url}/api/health")
        assert services.answers(f"{mlflow.url}/api/2.0/mlflow/experiments/search?max_results=1")
        for each in (server, mlflow):
            assert _listening_addresses(each.pid) == {"127.0.0.1"}
        run_id = start_run(settings, "test", "without the server", {})
        assert services.answers(f"{mlflow.url}/api/2.0/mlflow/runs/get?run_id={run_id}"), "they share a database"
        flows = {path.stem for path in (ROOT / "flows").glob("*.py")} - {"__init__"}
        assert _deployments(server.url) == flows
        assert services.up(settings, project=ROOT) == (server, worker, mlflow), "a second `up` starts nothing new"
        parents = [psutil.Process(service.pid) for service in (server, worker, mlflow)]
        processes = [*parents, *(child for each in parents for child in each.children(recursive=True))]
    finally:
        stopped = services.down(tmp_path)
    assert [service.name for service in stopped] == ["prefect-worker", "prefect-server", "mlflow-server"]
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    assert services.find(tmp_path, "prefect-server") is None
    assert services.down(tmp_path) == []


@pytest.mark.engines
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children of a killed process on Linux only")
def test_a_killed_run_leaves_no_server_behind(tmp_path: Path) -> None:
    script = (
        "import time; from imagerag.services import prefect_server; from imagerag.settings import Settings\n"
        "with prefect_server(Settings()) as url: print(url, flush=True); time.sleep(600)"
    )
    environment = os.environ | {"IMAGERAG_HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        url = run.stdout.readline().strip()
        assert services.answers(f"{url}/health")
        run.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while services.answers(f"{url}/health") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not services.answers(f"{url}/health")


def test_a_configured_server_is_used_as_it_is(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, prefect_api_url="http://prefect.example/api")
    with services.prefect_server(settings) as url:
        assert url == "http://prefect.example/api"
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_another_process_is_not_believed(tmp_path: Path) -> None:
    record = tmp_path / "services" / "prefect-server.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"name": "prefect-server", "pid": os.getpid(), "started": 1.0, "url": "http://x"}))
    assert services.find(tmp_path, "prefect-server") is None


def test_up_needs_the_deployments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prefect\.yaml"):
        services.up(Settings(home=tmp_path / "home"), project=tmp_path)
