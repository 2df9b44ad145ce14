"""Runs of the deployments of `infra/prefect.yaml` on a real Prefect server: automations, and trainings that end."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
from prefect.flow_engine import load_flow, load_flow_run, run_flow

from imagerag.embedded.sample import load_drawings
from imagerag.retrieval.feature_column import cached_features
from imagerag.retrieval.publish import published_version
from imagerag.retrieval.store import Store
from imagerag.services import prefect_environment
from imagerag.settings import Settings
from imagerag.training.config import tiny
from tests.end_to_end.prefect_api import call
from tests.jobs import use_jobs_here
from tests.security.leaks import files_with_secrets

pytestmark = pytest.mark.engines

ROOT = Path(__file__).parent.parent.parent
NAME = "mine"
WAIT_S = 300


class Server:
    """A Prefect server with all deployments and no worker: the tests themselves execute the runs that they want."""

    def __init__(self, settings: Settings, engines_home: Path, api_url: str) -> None:
        self.settings = settings
        self.prefect_home, self._api_url = engines_home, api_url
        self._own = {"IMAGERAG_HOME": str(settings.home), "IMAGERAG_PROJECT": str(ROOT)}
        prefects = prefect_environment(Settings(home=engines_home), api_url)
        deploy = [sys.executable, "-m", "imagerag.cli", "deploy"]
        self._environment = os.environ | prefects | self._own
        subprocess.run(deploy, check=True, env=self._environment | {"IMAGERAG_PREFECT_API_URL": api_url})
        self._deployments = {each["name"]: each["id"] for each in self.post("/deployments/filter", {})}

    def call(self, method: str, path: str, body: object = None) -> Any:
        return call(self._api_url, self.prefect_home, method, path, body)

    def post(self, path: str, body: object) -> Any:
        return self.call("POST", path, body)

    def heartbeats(self, run_id: str) -> list[Any]:
        of = {
            "event": {"name": ["prefect.flow-run.heartbeat"]},
            "resource": {"id": [f"prefect.flow-run.{run_id}"]},
        }
        events: list[Any] = self.post("/events/filter", {"filter": of})["events"]
        return events

    def execute(self, run_id: str) -> "subprocess.Popen[bytes]":
        """Do what a worker does."""
        return subprocess.Popen([sys.executable, "-m", "prefect", "flow-run", "execute", run_id], env=self._environment)

    def execute_here(self, run_id: str) -> None:
        """Do what the process does that a worker starts."""
        flow_run = load_flow_run(UUID(run_id))
        with pytest.MonkeyPatch.context() as patch, chdir(ROOT):
            for name, value in self._own.items():
                patch.setenv(name, value)
            use_jobs_here(patch)
            run_flow(load_flow(flow_run), flow_run=flow_run)

    def create_run(self, deployment: str, parameters: object) -> str:
        path = f"/deployments/{self._deployments[deployment]}/create_flow_run"
        run_id: str = self.post(path, {"parameters": parameters})["id"]
        return run_id

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        of = {"deployment_id": {"any_": [self._deployments[deployment]]}}
        runs: list[dict[str, Any]] = self.post("/flow_runs/filter", {"flow_runs": of})
        return runs

    def state(self, run_id: str) -> str:
        (run,) = self.post("/flow_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
        state: str = run["state_type"]
        return state

    def event(self, name: str, deployment: str, payload: dict[str, object]) -> None:
        """Announce what a run of a deployment would about the corpus."""
        related = {
            "prefect.resource.id": f"prefect.deployment.{self._deployments[deployment]}",
            "prefect.resource.name": deployment,
            "prefect.resource.role": "deployment",
        }
        event = {
            "id": str(uuid4()),
            "event": name,
            "occurred": datetime.now(UTC).isoformat(),
            "resource": {"prefect.resource.id": f"imagerag.index.{NAME}", "prefect.resource.name": NAME},
            "related": [related],
            "payload": payload,
        }
        self.post("/events", [event])


def wait_for(what: Callable[[], Any], name: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := what()):
        assert time.monotonic() < deadline, f"no {name} within {WAIT_S} s"
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def server(
    engines_home: Path, prefect_api_url: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server on which a folder of drawings was ingested, and what followed from that by itself was executed."""
    folder = tmp_path_factory.mktemp("deployments")
    images = folder / "images"
    images.mkdir()
    for number, drawing in enumerate(load_drawings()[:24]):
        (images / f"drawing {number}.webp").write_bytes(drawing.image)
    server = Server(Settings(home=folder / "home"), engines_home, prefect_api_url)
    try:
        server.execute_here(server.create_run("ingest", {"url_list": str(images), "name": NAME}))
        (features,) = wait_for(lambda: server.runs("features"), "run of features")
        server.execute_here(features["id"])
        yield server
    finally:  # other tests have the server, too
        for automation in server.post("/automations/filter", {}):
            server.call("DELETE", f"/automations/{automation['id']}")


def test_a_published_index_gets_its_features(server: Server) -> None:
    (run,) = server.runs("features")
    assert run["parameters"] == {"name": NAME, "features": {"base": "tiny"}}
    assert run["state_type"] == "COMPLETED"
    store = Store(server.settings.index_uri, NAME)
    version = published_version(store)
    assert version is not None
    assert [each.base for each in cached_features(store.dataset(version).schema)] == ["tiny"]


def test_no_run_wrote_a_secret_down(server: Server) -> None:
    """Not in its log, parameters, artifacts or results, which Prefect keeps in its home."""
    assert list(server.prefect_home.rglob("*.db"))
    assert files_with_secrets(server.prefect_home) == []


def test_a_champion_that_is_behind_is_evaluated(server: Server) -> None:
    assert server.runs("evaluate") == [], "there is no champion, and features announced none"
    server.event(
        "imagerag.champion.behind",
        "features",
        {"adapter": "models:/imagerag-turbo/1", "version": 1, "model_name": "mugs"},
    )
    (run,) = wait_for(lambda: server.runs("evaluate"), "run of evaluate")
    assert run["parameters"] == {"name": NAME, "adapter": "models:/imagerag-turbo/1", "model_name": "mugs"}
    assert len(server.runs("features")) == 1, "the features job does not start itself again"


def test_a_cancelled_training_leaves_nothing_running_and_a_killed_one_is_marked(server: Server) -> None:
    """That the same training goes on afterwards is in `tests/training/test_finetune.py`."""
    data = tiny().data.model_copy(update={"held_out_share": 0.3})
    parameters = {"name": NAME, "data": data.model_dump()}

    run_id = server.create_run("finetune", parameters)
    process = server.execute(run_id)
    wait_for(lambda: any("MapWorker" in title(each) for each in tree(process.pid)), "worker")
    below = tree(process.pid)
    assert any("raylet" in title(each) for each in below)
    server.post(f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
    process.wait(WAIT_S)
    assert server.state(run_id) == "CANCELLED"
    wait_for(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in below), "end")
    assert not Path(server.settings.training_of(NAME), "finetuned").exists()

    silent = "A run that has gone silent is marked as crashed"
    (automation,) = [each for each in server.post("/automations/filter", {}) if each["name"] == silent]
    path, patient = f"/automations/{automation['id']}", {key: automation[key] for key in ("name", "actions", "trigger")}
    server.call("PUT", path, patient | {"trigger": automation["trigger"] | {"within": 10}})
    run_id = server.create_run("finetune", parameters)
    process = server.execute(run_id)
    wait_for(lambda: server.heartbeats(run_id), "heartbeat")
    for each in [*tree(process.pid), process]:
        each.kill()
    process.wait(WAIT_S)
    assert server.state(run_id) == "RUNNING"
    wait_for(lambda: server.state(run_id) == "CRASHED", "crash")


def tree(pid: int) -> list[psutil.Process]:
    """All processes that it started."""
    return psutil.Process(pid).children(recursive=True)


def title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go
        return " ".join(process.cmdline())
    return ""
