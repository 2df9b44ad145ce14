"""A machine that has not joined the cluster: commands as jobs of Ray, by its Jobs API."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.cluster.conftest import MARKS, NUM_IMAGES
from tests.cluster.engines import Cluster

pytestmark = MARKS

# One that says so when it was asked to end, and otherwise goes on for longer than any test.
SLEEPER = """
import signal, sys, time
def end(*_):
    print("asked to end", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("asleep", flush=True)
time.sleep(600)
"""


def submitted(engines: Cluster, *command: str, job_id: str) -> "subprocess.Popen[str]":
    """`imagerag submit` on a machine that knows the Jobs API and Ray's token, and no other credentials."""
    token = {name: value for name, value in engines.environment.items() if name.startswith("RAY_")}
    settings = {
        name: value
        for name, value in engines.environment.items()
        if name.startswith("IMAGERAG_") and name != "IMAGERAG_RAY_ADDRESS"
    }
    there = {"RAY_API_SERVER_ADDRESS": engines.jobs_address, "AWS_ALLOW_HTTP": "true"}
    return subprocess.Popen(
        [sys.executable, "-m", "imagerag.cli", "submit", "--id", job_id, "--", *command],
        env=os.environ | token | settings | there, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_flow_runs_as_a_job_and_is_followed_to_its_end(engines: Cluster, url_list: Path) -> None:
    parameters = engines.folder / "ingest.json"
    parameters.write_text('{"download": {"allowed_hosts": ["127.0.0.1"], "image_format": "webp", "timeout_s": 5}}')
    command = (sys.executable, "-m", "imagerag.cli", "ingest", str(url_list), "--parameters", str(parameters))
    process = submitted(engines, *command, "--name", "jobs", job_id="ingest-1")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert f"{NUM_IMAGES} added" in said
    assert [secret for secret in engines.secrets if secret in said] == []
    assert any(key.startswith("index/jobs.lance") for key in engines.objects(""))

    refused = submitted(engines, *command, "--name", "no/name", job_id="ingest-2")
    said, _ = refused.communicate()
    assert refused.returncode != 0
    assert "no/name" in said, "what the job says of a mistake is shown"


def test_what_ends_its_follower_ends_the_job(engines: Cluster) -> None:
    process = submitted(engines, sys.executable, "-c", SLEEPER, job_id="sleeper")
    read_up_to("asleep", process)  # which is seen while the job runs

    other = submitted(engines, sys.executable, "-c", SLEEPER, job_id="sleeper")
    read_up_to("following job sleeper", other)
    read_up_to("asleep", other)
    other.kill()
    other.wait()
    assert len(sleepers()) == 1, "one that is killed outright leaves the job as it was"

    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    deadline = time.monotonic() + 30
    while sleepers():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def read_up_to(text: str, process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    lines = []
    while text not in (line := process.stdout.readline()):
        lines.append(line)
        assert line, f"it ended without {text!r}: {lines}"


def sleepers() -> list[psutil.Process]:
    """The jobs, without the shells that started them and without their followers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[1:2] == ["-c"] and "asked to end" in line[-1] and "asleep" in line[-1] and "python" in line[0]:
            found.append(process)
    return found
