"""A cluster for all tests, and flows that are started on it from the command line."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from imagerag.embedded.sample.server import SampleServer
from tests.cluster.engines import POSTGRES, Cluster, cluster

MARKS = [pytest.mark.cluster, pytest.mark.timeout(1200)]
NEEDED = {
    "other systems have one loopback address": sys.platform == "linux",
    "only root can hide a machine's home from Ray's nodes": os.geteuid() == 0,
    "there is no PostgreSQL on this machine": POSTGRES is not None,
}
"""Why the tests can't run, and whether they can."""
NUM_IMAGES = 64
PARAMETERS = {
    "ingest": {
        "download": {"allowed_hosts": ["127.0.0.1"], "image_format": "webp", "shard_size": 16, "timeout_s": 5},
        "embed": {"batch_size": 16, "commit_every_s": 0, "stall_timeout_s": 60},
    },
    # Each node has one core, so that two workers need both.
    "finetune": {
        "data": {"held_out_share": 0.1},
        "training": {"steps": 4, "checkpoint_every": 1, "batch_size": 8, "micro_batch_size": 4, "num_validated": 4},
        "workers": {"num_workers": 2},
    },
    "evaluate": {
        "evaluation": {
            "ways": ["base", "best_slerp", "adapter", "champion"],
            "num_prompts": 4,
            "slerp_ws": [0.2],
            "adapter_scales": [],
            "files": {"clip": "FOLDER/clip"},
        },
        "gate": {"metric": "clip_score", "max_slowdown": 100},
    },
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests where they can't run, or fail for `make test-cluster`, whose success says that they ran."""
    lacking = [why for why, is_there in NEEDED.items() if not is_there]
    if lacking and item.get_closest_marker("cluster"):
        (pytest.fail if "CLUSTER_REQUIRED" in os.environ else pytest.skip)(lacking[0])


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="session")
def url_list(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("list") / "urls.parquet"
    with SampleServer() as server:
        urls = server.url_list(limit=NUM_IMAGES)
        pq.write_table(urls.filter(pc.invert(pc.match_substring(urls["url"], "/bad/"))), path)
        yield path


class Flow:
    """One flow, as the command line runs it."""

    def __init__(self, engines: Cluster, flow: str, *arguments: str, **environment: str) -> None:
        self._engines = engines
        home = {"IMAGERAG_HOME": str(engines.home)}
        self._environment = os.environ | engines.environment | home | environment
        self._command = [sys.executable, "-m", "imagerag.cli", flow, *arguments]
        if flow in PARAMETERS:
            parameters = engines.folder / f"{flow}.json"
            parameters.write_text(json.dumps(PARAMETERS[flow]).replace("FOLDER", str(engines.folder)))
            self._command += ["--parameters", str(parameters)]
        self.said = ""

    @contextmanager
    def started(self) -> "Iterator[subprocess.Popen[str]]":
        """Have it run for as long as the block, and then to its end."""
        with (self._engines.folder / "flow.out").open("w+") as out:
            process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
            try:
                self._process = process
                yield process
            finally:
                process.wait()
                out.seek(0)
                self.said = out.read()

    def run(self) -> str:
        """Run it to its end, which has to be a good one; returns what it said."""
        with self.started() as process:
            pass
        assert process.returncode == 0, self.said
        return self.said

    def wait_for(self, prefix: str, end: str) -> None:
        """Wait until it has written such an object that was not there when this was called."""
        before = self._engines.objects(prefix)
        while not any(key.endswith(end) for key in self._engines.objects(prefix).keys() - before.keys()):
            assert self._process.poll() is None, "it ended before"
            time.sleep(0.1)
