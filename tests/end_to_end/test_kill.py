"""Kill -9 at ten random moments of an ingest, each followed by a rerun: the table ends as if nothing had happened."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from imagerag.corpus.sample.server import SampleServer, write_url_list
from imagerag.retrieval.publish import status
from imagerag.retrieval.store import Store

KILLS = 10
SEED = 20260212
NAME = "kill"
# Small shards and commits, so that there are many moments to be killed between.
PARAMETERS = {
    "download": {
        "allowed_hosts": ["127.0.0.1"],
        "image_format": "webp",
        "shard_size": 25,
        "timeout_s": 1,
        "retries": 1,
    },
    "embed": {"batch_size": 32, "commit_every_s": 0},
}


def _ingest(home: Path, url_list: Path, api_url: str) -> "subprocess.Popen[str]":
    parameters = home.with_suffix(".json")
    parameters.write_text(json.dumps(PARAMETERS))
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "imagerag.cli",
            "ingest",
            str(url_list),
            "--name",
            NAME,
            "--parameters",
            str(parameters),
        ],
        env=os.environ | {"IMAGERAG_HOME": str(home), "IMAGERAG_PREFECT_API_URL": api_url, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(home: Path, url_list: Path, api_url: str, kill_after_s: float | None) -> tuple[bool, float]:
    """Run an ingest; kill it so long after its flow began. Returns whether it was killed and how long the flow took."""
    process = _ingest(home, url_list, api_url)
    assert process.stdout is not None
    output: list[str] = []
    killer: threading.Timer | None = None
    began = time.monotonic()
    for line in process.stdout:
        output.append(line)
        if "Beginning flow run" in line:
            began = time.monotonic()
            if kill_after_s is not None:
                killer = threading.Timer(kill_after_s, process.kill)
                killer.start()
    code = process.wait()
    if killer is not None:
        killer.cancel()
    assert code in (0, -9), "".join(output)
    return code == -9, time.monotonic() - began


def _content(home: Path) -> pa.Table:
    """Everything that the published version holds, in the order of the ids."""
    store = Store(str(home / "index"), NAME)
    version = status(store).published_version
    assert version is not None
    return store.dataset(version).to_table().sort_by("id")


@pytest.mark.engines
@pytest.mark.timeout(1200)
def test_ten_kills_leave_the_table_identical(tmp_path: Path, prefect_api_url: str) -> None:
    moments = random.Random(SEED)
    with SampleServer() as server:
        url_list = write_url_list(server, tmp_path, limit=200)
        killed, duration_s = _run(tmp_path / "undisturbed", url_list, prefect_api_url, kill_after_s=None)
        assert not killed
        expected = _content(tmp_path / "undisturbed")
        assert expected.num_rows > 150

        kills = completions = 0
        home = tmp_path / "disturbed"
        while kills < KILLS or completions == 0:
            moment = moments.uniform(0, duration_s) if kills < KILLS else None
            killed, _ = _run(home, url_list, prefect_api_url, kill_after_s=moment)
            kills += killed
            if not killed:
                completions += 1
                assert _content(home).equals(expected), f"the table differs after {kills} kills"
                if kills < KILLS:
                    shutil.rmtree(home)
                    completions = 0
