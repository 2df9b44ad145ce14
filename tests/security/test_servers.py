"""`imagerag up` and `down`, and what its servers answer to other users and to pages of other sites."""

import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from imagerag import credentials, services
from imagerag.cli import app
from imagerag.settings import Settings
from imagerag.training.tracking import start_run
from tests.end_to_end.prefect_api import basic, call
from tests.security.leaks import AWS_SECRET, ENVIRONMENT, URL_PASSWORD, files_with_secrets

pytestmark = pytest.mark.engines

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose services are up; in the end all of them go down."""
    home = tmp_path_factory.mktemp("outside") / "home"
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            up = services.up(Settings(home=home), project=ROOT)
        processes = [process for each in up for process in tree(each)]
        yield home
    finally:
        stopped = services.down(home)
    assert [each.name for each in stopped] == [services.WORKER, services.PREFECT, services.MLFLOW]
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    assert services.find(home, services.PREFECT) is None
    assert services.down(home) == []


def tree(root: services.Service) -> list[psutil.Process]:
    parent = psutil.Process(root.pid)
    return [parent, *parent.children(recursive=True)]


def status(url: str, headers: dict[str, str], method: str = "GET", data: bytes | None = None) -> int:
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def answer_of(home: Path, name: str, path: str) -> str:
    own = urllib.request.Request(f"{service(home, name).url}{path}", headers={"Authorization": basic(home)})
    with urllib.request.urlopen(own) as response:
        answer: bytes = response.read()
    return answer.decode()


def service(home: Path, name: str) -> services.Service:
    found = services.find(home, name)
    assert found is not None
    return found


def test_they_listen_on_loopback_only(home: Path) -> None:
    for name in (services.PREFECT, services.MLFLOW):
        connections = [each for process in tree(service(home, name)) for each in process.net_connections("tcp")]
        listening = {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}


def test_every_flow_is_deployed_and_a_second_up_starts_nothing_new(home: Path) -> None:
    first = tuple(service(home, name) for name in (services.PREFECT, services.WORKER, services.MLFLOW))
    flows = {path.stem for path in (ROOT / "flows").glob("*.py")} - {"__init__", "parameters"}
    deployments = call(f"{first[0].url}/api", home, "POST", "/deployments/filter", {})
    assert {each["name"] for each in deployments} == flows
    assert services.up(Settings(home=home), project=ROOT) == first


def test_a_run_without_the_server_shares_its_database(home: Path) -> None:
    run_id = start_run(Settings(home=home), "test", "without the server", {})
    url = f"{service(home, services.MLFLOW).url}/api/2.0/mlflow/runs/get?run_id={run_id}"
    assert status(url, {"Authorization": basic(home)}) == 200


PROTECTED = [
    (services.PREFECT, "/api/flows/count", "POST"),
    (services.PREFECT, "/api/admin/settings", "GET"),
    (services.MLFLOW, "/api/2.0/mlflow/experiments/search?max_results=1", "GET"),
    (services.MLFLOW, "/ajax-api/2.0/mlflow/experiments/search?max_results=1", "GET"),
]


@pytest.mark.parametrize(("name", "path", "method"), PROTECTED)
def test_nothing_is_answered_without_the_password(home: Path, name: str, path: str, method: str) -> None:
    url = f"{service(home, name).url}{path}"
    wrong = "Basic aW1hZ2VyYWc6d3Jvbmc="
    for headers in ({}, {"Authorization": wrong}):
        assert status(url, headers, method) in (401, 403)
    if method == "GET":
        assert status(url, {"Authorization": basic(home)}) == 200


@pytest.mark.parametrize("name", [services.PREFECT, services.MLFLOW])
def test_a_rebound_host_name_is_refused(home: Path, name: str) -> None:
    url, own = service(home, name).url, {"Authorization": basic(home)}
    path = next(path for each, path, method in PROTECTED if each == name and method == "GET")
    assert status(f"{url}{path}", own) == 200
    assert status(f"{url}{path}", own | {"Host": "rebound.example"}) in (400, 403)


def test_a_change_needs_a_token_that_no_other_site_can_read(home: Path) -> None:
    url, own = service(home, services.PREFECT).url, {"Authorization": basic(home), "Content-Type": "application/json"}
    assert status(f"{url}/api/flows/filter", own, "POST", b"{}") == 403
    assert call(f"{url}/api", home, "POST", "/flows/filter", {}) is not None


@pytest.mark.parametrize("name", [services.PREFECT, services.MLFLOW])
def test_no_other_origin_may_ask(home: Path, name: str) -> None:
    path = {services.PREFECT: "/api/flows/filter", services.MLFLOW: "/ajax-api/2.0/mlflow/experiments/search"}[name]
    headers = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
    request = urllib.request.Request(f"{service(home, name).url}{path}", None, headers, method="OPTIONS")
    try:
        with urllib.request.urlopen(request) as response:
            allowed = response.headers.get("Access-Control-Allow-Origin")
    except urllib.error.HTTPError as error:
        allowed = error.headers.get("Access-Control-Allow-Origin")
    assert allowed is None


def test_the_password_is_its_owners_alone(home: Path) -> None:
    password = credentials.password(home)
    assert len(password) >= 32
    assert stat.S_IMODE((home / "password").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert list(home.glob(".password*")) == [], "no draft is left"


def test_no_secret_is_written_down_or_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in logs, databases (with MLflow's tags and Prefect's parameters), command lines or settings."""
    start_run(Settings(home=home), "test", "with tags", {}, {"who": "somebody"})
    assert list((home / "logs").iterdir()), "there is something to look at"
    assert files_with_secrets(home) == []
    shown = [answer_of(home, services.PREFECT, "/api/admin/settings")]
    for name in (services.PREFECT, services.WORKER, services.MLFLOW):
        shown += [part for process in tree(service(home, name)) for part in process.cmdline()]
    for name, value in ({"IMAGERAG_HOME": str(home)} | ENVIRONMENT).items():
        monkeypatch.setenv(name, value)
    for options in ([], ["--json"]):
        result = CliRunner().invoke(app, ["settings", *options])
        assert "store.example" in result.output
        shown.append(result.output)
    for secret in (credentials.password(home), AWS_SECRET, URL_PASSWORD):
        assert not any(secret in each for each in shown)


def test_the_link_logs_in(home: Path) -> None:
    page, password = services.link(service(home, services.PREFECT), home).split("#")
    with urllib.request.urlopen(page) as response:
        assert b"prefect-password" in response.read()
    assert password == f"imagerag%3A{credentials.password(home)}"


def test_two_who_ask_first_get_one_password(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        passwords = set(pool.map(credentials.password, [tmp_path] * 8))
    assert passwords == {credentials.password(tmp_path)}
