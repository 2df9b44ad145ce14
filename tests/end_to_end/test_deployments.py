"""Runs of the deployments of `infra/prefect.yaml` on a real Prefect server: automations, and a cancelled training."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from imagerag.corpus.sample import load_drawings
from imagerag.retrieval.features import cached_features
from imagerag.retrieval.publish import published_version
from imagerag.retrieval.store import Store
from imagerag.services import prefect_environment, prefect_server
from imagerag.settings import Settings
from imagerag.training.config import tiny
from imagerag.training.job import read_finetuned
from imagerag.training.tracking import mlflow_client, tracking_uri
from tests.end_to_end.prefect_api import call

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent.parent
NAME = "mine"
WAIT_S = 120


class Server:
    """A Prefect server with all deployments and no worker: the tests themselves execute the runs that they want."""

    def __init__(self, settings: Settings, api_url: str) -> None:
        self.settings = settings
        self._api_url = api_url
        own = {"IMAGERAG_HOME": str(settings.home), "IMAGERAG_PROJECT": str(ROOT)}
        self._environment = os.environ | prefect_environment(settings, api_url) | own
        done = self.start("-m", "imagerag.cli", "deploy", IMAGERAG_PREFECT_API_URL=api_url)
        assert done.wait() == 0
        self._deployments = {each["name"]: each["id"] for each in self.post("/deployments/filter", {})}

    def post(self, path: str, body: object) -> Any:
        return call(self._api_url, self.settings.home, "POST", path, body)

    def put(self, path: str, body: object) -> None:
        call(self._api_url, self.settings.home, "PUT", path, body)

    def heartbeats(self, run_id: str) -> list[Any]:
        of = {
            "event": {"name": ["prefect.flow-run.heartbeat"]},
            "resource": {"id": [f"prefect.flow-run.{run_id}"]},
        }
        events: list[Any] = self.post("/events/filter", {"filter": of})["events"]
        return events

    def start(self, *arguments: str, **variables: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, *arguments], env=self._environment | variables)

    def execute(self, run_id: str) -> "subprocess.Popen[bytes]":
        """Do what a worker does."""
        return self.start("-m", "prefect", "flow-run", "execute", run_id)

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
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on which a folder of drawings was ingested, and what followed from that by itself was executed."""
    folder = tmp_path_factory.mktemp("deployments")
    images = folder / "images"
    images.mkdir()
    for number, drawing in enumerate(load_drawings()[:24]):
        (images / f"drawing {number}.webp").write_bytes(drawing.image)
    settings = Settings(home=folder / "home")
    with prefect_server(settings) as api_url:
        server = Server(settings, api_url)
        assert server.execute(server.create_run("ingest", {"url_list": str(images), "name": NAME})).wait() == 0
        (features,) = wait_for(lambda: server.runs("features"), "run of features")
        assert server.execute(features["id"]).wait() == 0
        yield server


def test_a_published_index_gets_its_features(server: Server) -> None:
    (run,) = server.runs("features")
    assert run["parameters"] == {"name": NAME, "features": {"base": "tiny"}}
    assert run["state_type"] == "COMPLETED"
    store = Store(server.settings.index_uri, NAME)
    version = published_version(store)
    assert version is not None
    assert [each.base for each in cached_features(store.dataset(version).schema)] == ["tiny"]


def test_a_champion_that_is_behind_is_evaluated(server: Server) -> None:
    assert server.runs("evaluate") == [], "there is no champion, and features announced none"
    server.event("imagerag.champion.behind", "features", {"adapter": "models:/imagerag-turbo/1", "version": 1})
    (run,) = wait_for(lambda: server.runs("evaluate"), "run of evaluate")
    assert run["parameters"] == {"name": NAME, "adapter": "models:/imagerag-turbo/1"}
    assert len(server.runs("features")) == 1, "the features job does not start itself again"


def test_a_training_that_was_cancelled_goes_on(server: Server) -> None:
    recipe = tiny()
    training = recipe.training.model_copy(
        update={"steps": 40, "batch_size": 8, "micro_batch_size": 8, "checkpoint_every": 10, "num_validated": 4}
    )
    data = recipe.data.model_copy(update={"held_out_share": 0.3})
    parameters = {"name": NAME, "data": data.model_dump(), "training": training.model_dump()}
    folder = Path(server.settings.training_of(NAME))

    run_id = server.create_run("finetune", parameters)
    process = server.execute(run_id)
    wait_for(lambda: list(folder.glob("runs/*/checkpoint_*")), "checkpoint")
    below = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in each.name() for each in below)
    server.post(f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
    process.wait(WAIT_S)
    assert server.state(run_id) == "CANCELLED"
    wait_for(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in below), "end")
    assert not (folder / "finetuned").exists()

    run_id = server.create_run("finetune", parameters)
    assert server.execute(run_id).wait() == 0
    assert server.state(run_id) == "COMPLETED"
    (made,) = (folder / "finetuned").iterdir()
    history = mlflow_client(tracking_uri(server.settings)).get_metric_history(
        read_finetuned(str(made)).run_id, "step_s"
    )
    steps = [metric.step for metric in history]
    assert max(steps) == 40
    assert steps.count(10) == 1, "the second run did not begin anew"


def test_a_run_whose_process_was_killed_is_crashed_and_the_next_one_runs(server: Server) -> None:
    silent = "A run that has gone silent is marked as crashed"
    (automation,) = [each for each in server.post("/automations/filter", {}) if each["name"] == silent]
    sooner = {key: automation[key] for key in ("name", "actions")} | {"trigger": automation["trigger"] | {"within": 10}}
    server.put(f"/automations/{automation['id']}", sooner)
    run_id = server.create_run("finetune", {"name": NAME, "data": {"held_out_share": 0.3}})
    process = server.execute(run_id)
    wait_for(lambda: server.heartbeats(run_id), "heartbeat")
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    assert server.state(run_id) == "RUNNING"
    wait_for(lambda: server.state(run_id) == "CRASHED", "crash")

    # Its deployment runs one at a time.
    parameters = {"name": NAME, "data": {"held_out_share": 0.3}, "dry_run": True}
    assert server.execute(again := server.create_run("finetune", parameters)).wait(WAIT_S) == 0
    assert server.state(again) == "COMPLETED"
