"""`evaluate` through a real Prefect server, to a champion in a real MLflow."""

from collections.abc import Callable
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client

from flows.evaluate import evaluate
from imagerag.artifacts import Finetuned
from imagerag.evaluation.config import EvaluateConfig, GateConfig, MetricFiles
from imagerag.evaluation.results import read_results
from imagerag.registry.promotion import promote, rollback
from imagerag.registry.versions import CANDIDATE, CHAMPION, list_versions
from tests.evaluation.networks import write_clip
from tests.training.conftest import NAME, World

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("jobs_here", "prefect_api_url")]


def aliases(world: World) -> dict[str, int]:
    return {alias: info.version for info in list_versions(world.settings) for alias in info.aliases}


def test_candidates_are_registered_and_only_a_better_one_is_champion(
    own_world: World,
    finetuned: Callable[..., Finetuned],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(own_world.settings.home))
    clip = str(write_clip(tmp_path_factory.mktemp("clip")))
    ways = ("base", "best_slerp", "adapter", "champion")
    config = EvaluateConfig(ways=ways, slerp_ws=(0.2,), adapter_scales=(), files=MetricFiles(clip=clip))
    strict = GateConfig(metric="clip_score", min_prompts=2, max_slowdown=100)
    first = finetuned(own_world, tracked=True)
    parameters = {"name": NAME, "evaluation": config, "gate": strict}
    report = evaluate(**parameters)
    assert report.evaluated.adapter == first.uri, "that of the last training"
    assert report.registered.is_new
    won = {CHAMPION: 1} if report.decision.passed else {}
    assert aliases(own_world) == {CANDIDATE: 1} | won
    (info,) = list_versions(own_world.settings)
    assert info.tags["imagerag.gate"] == ("passed" if report.decision.passed else "failed")
    assert "paired gain" in info.tags["imagerag.gate_reasons"]
    assert info.tags["imagerag.evaluation_run"] == report.evaluated.run_id
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(info.tags["imagerag.flow_run"]))
    assert run.name == f"evaluate {NAME}"
    assert info.run_id == first.run_id

    first_score = report.evaluated.metrics["adapter/clip_score"]

    again = evaluate(**parameters)
    assert not again.evaluated.is_new
    assert not again.registered.is_new
    assert len(list_versions(own_world.settings)) == 1

    promote(own_world.settings, 1, reason="to be compared with", author="a test")
    finetuned(own_world, tracked=True)
    second = evaluate(**parameters)
    ways = {way.name: way for way in read_results(second.evaluated.uri).ways}
    one, other = (ways[name].scores["clip_score"] for name in ("adapter", "champion"))
    assert one.by_prompt != other.by_prompt
    assert other.estimate.mean == pytest.approx(first_score, abs=1e-6), "the champion's pictures are the first's"
    assert any("better than the champion" in reason.rule for reason in second.decision.reasons)
    assert aliases(own_world)[CANDIDATE] == 2
    assert aliases(own_world)[CHAMPION] == (2 if second.decision.passed else 1)

    promote(own_world.settings, 2, reason="to be rolled back", author="a test")
    rollback(own_world.settings, reason="too dark", author="a test")
    third = evaluate(**parameters)
    assert not third.decision.passed
    assert "a test rolled back version 2: too dark" in third.decision.summary()
    assert aliases(own_world)[CHAMPION] == 1, "a rerun does not promote what a person rolled back"

    with get_client(sync_client=True) as client:
        texts = [str(artifact.data) for artifact in client.read_artifacts()]
    assert any("the gate" in text and "better than the base" in text for text in texts)
    assert any(f"{report.registered.uri}` is" in text and "CLIP score" in text for text in texts)
