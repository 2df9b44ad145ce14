"""The tasks of the flow `evaluate`: measure an adapter, apply the gate, register the model."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from imagerag.artifacts import Evaluated, Finetuned, Registered
from imagerag.evaluation.config import EvaluateConfig, GateConfig
from imagerag.evaluation.gate import Decision, decide
from imagerag.evaluation.results import GRID, read_results
from imagerag.registry.champion import Champion
from imagerag.registry.promotion import promote, rolled_back
from imagerag.registry.removal import prune
from imagerag.registry.versions import THE_GATE, register
from imagerag.settings import Settings, settings_of
from tasks.policy import stage
from tasks.progress import StageProgress

_LONGEST_DAYS = 7


@stage("evaluate", timeout_days=_LONGEST_DAYS)
def evaluate_adapter(
    finetuned: Finetuned, config: EvaluateConfig, gate: GateConfig, champion: Champion | None
) -> Evaluated:
    """Generate pictures with every compared method, and compute their metrics."""
    from imagerag.evaluation.evaluate import evaluate  # imports torch, which is slow and which other flows don't need

    with StageProgress("evaluate", "pictures") as on_progress:
        deployed = None if champion is None else champion.deployed
        result = evaluate(finetuned, config, Settings(), on_progress, champion=deployed, metric=gate.metric)
    logger = get_run_logger()
    if not result.is_new:
        logger.info("nothing to measure: %s was finished before", result.name)
    return result


@stage("gate")
def pass_gate(
    finetuned: Finetuned, evaluated: Evaluated, config: GateConfig, champion: Champion | None, model_name: str | None
) -> Decision:
    """Decide whether the candidate may become champion, and create an artifact with the reasons."""
    decision = decide(
        read_results(evaluated.uri),
        config,
        has_champion=champion is not None,
        is_index_update=champion is not None and champion.is_same_weights,
        rolled_back=rolled_back(settings_of(model_name), finetuned.name),
    )
    key = evaluated.index_name.replace("_", "-")
    create_markdown_artifact(
        f"# {evaluated.index_name}: the gate\n\n{decision.markdown()}\n",
        key=f"gate-{key}",
        description="Whether the candidate may become champion, and why",
    )
    return decision


@stage("register")
def register_model(
    finetuned: Finetuned,
    evaluated: Evaluated,
    decision: Decision,
    *,
    over: int | None,
    model_name: str | None,
    portable: bool,
    keep: int | None,
) -> Registered:
    """Register the candidate with its results, promote it if it passed the gate, and remove old versions.

    `over` is the version of the champion that the candidate was compared with.
    """
    settings = settings_of(model_name)
    tags = {
        "imagerag.gate": "passed" if decision.passed else "failed",
        "imagerag.gate_reasons": decision.summary(),
        "imagerag.flow_run": str(flow_run.id),
    }
    with TemporaryDirectory() as folder:
        grid = Path(folder) / GRID
        filesystem, remote = fsspec.url_to_fs(f"{evaluated.uri}/{GRID}")
        filesystem.get_file(remote, str(grid))
        registered = register(
            finetuned,
            settings,
            index_version=evaluated.index_version,
            results=read_results(evaluated.uri).markdown(),
            grid=grid,
            evaluation_run=evaluated.run_id,
            tags=tags,
            portable=portable,
            flow_run_url=url_for("flow-run", obj_id=flow_run.id),
        )
    if decision.passed:
        promote(settings, registered.version, reason=decision.summary(), author=THE_GATE, over=over)
        registered = replace(registered, is_champion=True)
        resource = {
            "prefect.resource.id": f"imagerag.model.{registered.name}",
            "prefect.resource.name": registered.name,
        }
        reasons = {"model": registered.uri, "reasons": decision.summary()}
        emit_event("imagerag.gate.passed", resource, payload=reasons)
    logger = get_run_logger()
    logger.info("%s %s", registered.uri, "is champion" if registered.is_champion else "stays a candidate")
    for removed in prune(settings, keep):
        logger.info("removed version %s of the model, beyond those that are kept", removed.version)
    return registered
