"""The same code on a cluster: PostgreSQL, S3 and two Ray nodes, with authentication, from the command line."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from imagerag.corpus.sample.server import SampleServer
from tests.cluster.engines import POSTGRES, Cluster, cluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address"),
    pytest.mark.skipif(POSTGRES is None, reason="there is no PostgreSQL on this machine"),
]

NAME = "cluster"
NUM_IMAGES = 64


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="module")
def url_list(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("list") / "urls.parquet"
    with SampleServer() as server:
        urls = server.url_list(limit=NUM_IMAGES)
        pq.write_table(urls.filter(pc.invert(pc.match_substring(urls["url"], "/bad/"))), path)
        yield path


def _start(engines: Cluster, *command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "imagerag.cli", *command],
        env=os.environ | engines.environment | {"IMAGERAG_HOME": str(engines.folder / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(engines: Cluster, *command: str) -> str:
    process = _start(engines, *command)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def _kill_after_first_shard(engines: Cluster, *command: str) -> None:
    process = _start(engines, *command)
    while not any(key.endswith("_stats.json") for key in engines.objects("shards/")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    process.communicate()


def test_flows_run_on_a_cluster_and_go_on_where_they_were_killed(engines: Cluster, url_list: Path) -> None:
    parameters = engines.folder / "parameters.json"
    download = {"allowed_hosts": ["127.0.0.1"], "image_format": "webp", "shard_size": 16, "timeout_s": 5}
    parameters.write_text(json.dumps({"download": download, "embed": {"batch_size": 16}}))
    ingest = ("ingest", str(url_list), "--name", NAME, "--parameters", str(parameters))
    _kill_after_first_shard(engines, *ingest)
    finished = {key: at for key, at in engines.objects("shards/").items() if key.endswith("_stats.json")}
    said = _run(engines, *ingest)
    assert f"{NUM_IMAGES} fine, 0 failed" in said
    assert f"{NUM_IMAGES} added" in said
    assert engines.objects("shards/").items() >= finished.items(), "what was finished is left alone"

    said += _run(engines, "features", "--name", NAME)
    # Each node has one core, so that two workers need both.
    training = {"steps": 2, "checkpoint_every": 1, "batch_size": 8, "micro_batch_size": 4, "num_validated": 4}
    parameters.write_text(json.dumps({"training": training, "workers": {"num_workers": 2}}))
    said += _run(engines, "finetune", "--name", NAME, "--parameters", str(parameters))
    assert "trained 2 steps" in said

    runs = engines.query("prefect", "SELECT f.name, r.state_name FROM flow_run r JOIN flow f ON f.id = r.flow_id")
    done = [("features", "Completed"), ("finetune", "Completed"), ("ingest", "Completed"), ("ingest", "Running")]
    assert sorted(runs) == done, "the last was killed"
    assert engines.query("mlflow", "SELECT status FROM runs") == [("FINISHED",)]
    kept = engines.objects("")
    for end in ("adapter/diffusion_pytorch_model.safetensors", "finetune.json", "000002.png"):
        assert any(key.endswith(end) for key in kept), end
    home = engines.folder / "home"
    assert not any((home / name).exists() for name in ("shards", "index", "training", "mlflow"))

    seen = said + "".join(engines.traces())
    assert [secret for secret in engines.secrets if secret in seen] == []
