"""The same code on a cluster: PostgreSQL, S3 and two Ray nodes, with authentication, from the command line."""

from pathlib import Path

from tests.cluster.conftest import MARKS, NUM_IMAGES, Flow
from tests.cluster.engines import Cluster
from tests.evaluation.networks import write_clip

pytestmark = MARKS

NAME = "cluster"


def test_flows_run_on_a_cluster_and_go_on_where_they_were_killed(engines: Cluster, url_list: Path) -> None:
    ingest = Flow(engines, "ingest", str(url_list), "--name", NAME)
    with ingest.started() as process:
        ingest.wait_for("shards/", "_stats.json")
        process.kill()
    finished = {key: at for key, at in engines.objects("shards/").items() if key.endswith("_stats.json")}
    said = ingest.run()
    assert f"{NUM_IMAGES} fine, 0 failed" in said
    assert f"{NUM_IMAGES} added" in said
    assert engines.objects("shards/").items() >= finished.items(), "what was finished is left alone"

    said += Flow(engines, "features", "--name", NAME).run()
    said += Flow(engines, "finetune", "--name", NAME).run()
    assert "trained 4 steps" in said

    runs = engines.query("prefect", "SELECT f.name, r.state_name FROM flow_run r JOIN flow f ON f.id = r.flow_id")
    done = [("features", "Completed"), ("finetune", "Completed"), ("ingest", "Completed"), ("ingest", "Running")]
    assert sorted(runs) == done, "the last was killed"
    assert engines.query("mlflow", "SELECT status FROM runs") == [("FINISHED",)]
    kept = engines.objects("")
    for end in ("adapter/diffusion_pytorch_model.safetensors", "finetune.json", "000004.png"):
        assert any(key.endswith(end) for key in kept), end

    write_clip(engines.folder / "clip")
    evaluated = Flow(engines, "evaluate", "--name", NAME).run()
    Flow(engines, "promote", "1", "--reason", "to be compared with").run()
    Flow(engines, "finetune", "--name", NAME, "--steps", "5").run()
    compared = Flow(engines, "evaluate", "--name", NAME).run()
    assert engines.objects(f"training/{NAME}/champions/"), "where nodes read it that don't see this machine's home"
    said += evaluated + compared

    assert not any((engines.home / name).exists() for name in ("shards", "index", "training", "mlflow"))

    seen = said + "".join(engines.traces())
    assert [secret for secret in engines.secrets if secret in seen] == []
