"""What a flow relies on is lost while it runs: it ends well, or as a failure after which a rerun does."""

import subprocess
import time
from pathlib import Path

import pytest

from imagerag.retrieval.publish import published_rows
from imagerag.retrieval.store import Store
from imagerag.training.worker import STATE
from tests.cluster.conftest import MARKS, NUM_IMAGES, Flow
from tests.cluster.engines import Cluster

pytestmark = MARKS

ADDED = f"{NUM_IMAGES} added"


def test_a_node_is_lost_while_embedding_and_training(engines: Cluster, url_list: Path) -> None:
    ingest = Flow(engines, "ingest", str(url_list), "--name", "node")
    with ingest.started() as process:
        ingest.wait_for("index/node.lance/data/", ".lance")
        engines.processes["node"].kill()
    engines.begin("node")
    assert process.returncode == 0, ingest.said
    assert ADDED in ingest.said

    Flow(engines, "features", "--name", "node").run()
    finetune = Flow(engines, "finetune", "--name", "node")
    with finetune.started() as process:
        finetune.wait_for("training/node/", STATE)
        engines.processes["node"].kill()
        time.sleep(20)
        engines.begin("node")
    assert process.returncode == 0, finetune.said
    assert "trained 4 steps" in finetune.said


@pytest.mark.parametrize(("name", "away_s"), [("s3", 30), ("prefect", 5)])
def test_a_server_is_gone_for_a_while(engines: Cluster, url_list: Path, name: str, away_s: int) -> None:
    ingest = Flow(engines, "ingest", str(url_list), "--name", name)
    with ingest.started() as process:
        ingest.wait_for(f"shards/{name}/", "_stats.json")
        engines.processes[name].kill()
        time.sleep(away_s)
        engines.begin(name)
    assert process.returncode == 0, ingest.said
    assert ADDED in ingest.said


def test_the_disk_is_full(engines: Cluster, url_list: Path) -> None:
    places = {f"IMAGERAG_{name}_URI": str(engines.disk / name.lower()) for name in ("SHARDS", "INDEX")}
    ingest = Flow(engines, "ingest", str(url_list), "--name", "disk", **places)
    with ingest.started() as process:
        pass
    assert process.returncode == 1, ingest.said
    assert "No space left on device" in ingest.said
    subprocess.run(["mount", "-o", "remount,size=1g", str(engines.disk)], check=True)
    ingest.run()  # what was committed before the disk was full is not added again
    assert published_rows(Store(places["IMAGERAG_INDEX_URI"], "disk")) == NUM_IMAGES
