"""`imagerag deploy`, and the server that is lent for a run, with a real Prefect; `up` is tried in `tests/security`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from imagerag import credentials, processes, services
from imagerag.cli import app
from imagerag.errors import UserError
from imagerag.settings import Settings
from tests.end_to_end.prefect_api import call

ROOT = Path(__file__).parent.parent.parent


def _deployed(url: str, home: Path) -> tuple[dict[str, Any], list[Any], dict[str, bool]]:
    """Deployments by name, the schedules of `reindex`, and which automations are on."""
    deployments = {each["name"]: each for each in call(url, home, "POST", "/deployments/filter", {})}
    schedules = [
        (each["slug"], each["schedule"], each["active"], each["parameters"])
        for each in deployments["reindex"]["schedules"]
    ]
    automations = {each["name"]: each["enabled"] for each in call(url, home, "POST", "/automations/filter", {})}
    return deployments, sorted(schedules, key=str), automations


LENDING = """
import sys
from imagerag.services import prefect_server
from imagerag.settings import Settings
with prefect_server(Settings()) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Run:
    """A process that uses a Prefect server of its home, which is lent to it."""

    home: Path
    process: "subprocess.Popen[str]"
    url: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    home = tmp_path_factory.mktemp("lent") / "home"
    environment = os.environ | {"IMAGERAG_HOME": str(home)}
    command = [sys.executable, "-c", LENDING]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the server did not start"
        yield Run(home, process, url)


@pytest.mark.engines
def test_deploying_again_keeps_what_people_set_in_the_ui(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has Prefect imported already; its other settings are put back."""
    home, url = run.home, run.url
    login = f"{credentials.USER}:{credentials.password(home)}"
    weekly = {"cron": "0 5 * * 1", "timezone": "UTC"}

    def deploy(**variables: str) -> str:
        done = CliRunner().invoke(app, ["deploy"], env=variables, catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGERAG_HOME", str(home))
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: login}):
        monkeypatch.setenv("IMAGERAG_PROJECT", str(ROOT))
        for name, value in services.prefect_environment(Settings(), url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("IMAGERAG_PREFECT_API_URL", url)
        first = deploy()
        assert {line.split(": ")[1] for line in first.splitlines()} == {"deployed"}
        deployments, (nightly,), automations = _deployed(url, home)
        assert (nightly[0], nightly[1]["cron"], nightly[2]) == ("nightly", "0 3 * * *", False), "it is there, and off"
        assert set(automations.values()) == {True}

        reindex = deployments["reindex"]["id"]
        call(url, home, "POST", f"/deployments/{reindex}/schedules", [{"schedule": weekly, "active": True}])
        off = "The champion is evaluated on a published index"
        of = next(each["id"] for each in call(url, home, "POST", "/automations/filter", {}) if each["name"] == off)
        call(url, home, "PATCH", f"/automations/{of}", {"enabled": False})
        pool = {"concurrency_limit": 3}
        call(url, home, "PATCH", "/work_pools/imagerag", pool)
        _, schedules, _ = _deployed(url, home)
        assert len(schedules) == 2

        assert {line.split(": ")[1] for line in deploy().splitlines()} == {"unchanged"}
        lost = "A published index gets its features"  # as if what made it had been killed before it was there
        of = next(each["id"] for each in call(url, home, "POST", "/automations/filter", {}) if each["name"] == lost)
        call(url, home, "DELETE", f"/automations/{of}")
        for name in ("reindex", "evaluate"):  # as if another release had deployed them
            call(url, home, "PATCH", f"/deployments/{deployments[name]['id']}", {"version": "another"})
        again = deploy()
        assert "features: deployed" in again
        assert again.count(": deployed") == 3
        assert _deployed(url, home)[1:] == (schedules, automations | {off: False})
        assert call(url, home, "GET", "/work_pools/imagerag")["concurrency_limit"] == 3

        parameters = {"url_list": "s3://lists/catalogue.parquet", "name": "catalogue"}
        deploy(IMAGERAG_NIGHTLY=json.dumps(parameters))
        _, after, _ = _deployed(url, home)
        own = next(each for each in after if each[0] == "nightly")
        assert own[2:] == (True, parameters)
        (of,) = (each["id"] for each in _deployed(url, home)[0]["reindex"]["schedules"] if each["slug"] == "nightly")
        call(url, home, "PATCH", f"/deployments/{reindex}/schedules/{of}", {"active": False})
        assert "stays paused" in deploy(IMAGERAG_NIGHTLY=json.dumps(parameters))
        others = parameters | {"name": "another"}
        deploy(IMAGERAG_NIGHTLY=json.dumps(others))
        again = next(each for each in _deployed(url, home)[1] if each[0] == "nightly")
        assert again[2:] == (True, others), "other parameters are a new decision"
        assert [each for each in after if each[0] is None] == [each for each in schedules if each[0] is None]


def test_a_nightly_list_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for value, message in (
        ('{"url": "images.csv"}', "IMAGERAG_NIGHTLY has to hold parameters of the flow `reindex`: url_list: Field req"),
        ("images.csv", "IMAGERAG_NIGHTLY must be a JSON object, got 'images.csv'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "imagerag.cli", "up"], capture_output=True, text=True, cwd=tmp_path,
            env=os.environ | {"IMAGERAG_HOME": str(tmp_path / "home"), "IMAGERAG_NIGHTLY": value},
        )  # fmt: skip
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "home" / "services").exists()


@pytest.mark.engines
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children of a killed process on Linux only")
def test_a_killed_run_leaves_no_server_behind(run: Run) -> None:
    assert processes.answers(f"{run.url}/health")
    run.process.kill()
    deadline = time.monotonic() + 10
    while processes.answers(f"{run.url}/health") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes.answers(f"{run.url}/health")


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


def test_up_needs_the_deployments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_DISTRIBUTION", "one-that-is-not-installed")
    with pytest.raises(UserError, match=r"prefect\.yaml"):
        services.up(Settings(home=tmp_path / "home"), project=tmp_path)
    assert not (tmp_path / "home").exists(), "nothing was started"
