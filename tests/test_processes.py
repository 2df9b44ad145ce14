"""Processes of a home, with Python's own HTTP server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from imagerag import processes
from imagerag.processes import Service, ServiceError, answering, answers, await_healthy, find, free_port, start, stop

NAME = "server"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Service]:
    service = serve(tmp_path, stay=True)
    yield service
    stop(service)


def serve(home: Path, *, stay: bool) -> Service:
    port = free_port()
    command = ("http.server", str(port), "--bind", "127.0.0.1", "--directory", str(home))
    return start(home, NAME, command, {"OF_THE_SERVER": "1"}, url=f"http://127.0.0.1:{port}", stay=stay)


def test_a_permanent_process_is_found_until_it_is_stopped(tmp_path: Path, server: Service) -> None:
    await_healthy(server, tmp_path, "/")
    assert find(tmp_path, NAME) == answering(tmp_path, NAME, "/") == server
    assert find(tmp_path, "another") is None
    assert psutil.Process(server.pid).environ()["OF_THE_SERVER"] == "1"
    assert "GET / " in (tmp_path / "logs" / f"{NAME}.log").read_text()
    stop(server)
    assert not server.running
    assert find(tmp_path, NAME) is None
    assert not answers(server.url)
    stop(server)


def test_a_process_id_that_was_given_to_another_is_not_the_process(server: Service) -> None:
    assert server.running
    assert not Service(name=NAME, pid=server.pid, started=server.started - 1, url="").running


def test_a_server_that_does_not_answer_is_stopped(
    tmp_path: Path, server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await_healthy(server, tmp_path, "/")
    monkeypatch.setattr(processes, "_ANSWER_TIMEOUT_S", 0.5)
    assert answering(tmp_path, NAME, "/is-not-there") is None
    assert not server.running


def test_a_server_that_ends_at_once_is_told_of_with_its_log(tmp_path: Path) -> None:
    service = start(tmp_path, NAME, ("http.server", "no port"), {}, url="http://127.0.0.1:1", stay=False)
    with pytest.raises(ServiceError, match=rf"{NAME} exited while starting; see .*logs/{NAME}\.log"):
        await_healthy(service, tmp_path, "/")
    assert not (tmp_path / "services").exists(), "it was not to stay"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_a_temporary_process_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tests.test_processes import serve\n"
        f"print(serve(Path({str(tmp_path)!r}), stay=False).pid, flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(timeout=30)
