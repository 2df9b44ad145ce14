"""Lineage of a version in MLflow: its training's run, whose output it is, and the evaluation's, whose input it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagerag.artifacts import Finetuned
from imagerag.settings import Settings
from imagerag.training.finetune import EXPERIMENT
from imagerag.training.tracking import find_run, start_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_OF_THE_CANDIDATE = "adapter/"
"""Prefix of the candidate's metrics in an evaluation's run."""


def run_of(client: "MlflowClient", finetuned: Finetuned, settings: Settings) -> Any:
    """Return a training's MLflow run; if MLflow has lost it, a new run with its name.

    Raises:
        UserError: if MLflow can't be used.
    """
    run = find_run(client, finetuned.run_id)
    if run is None:
        tags = {"base_digest": finetuned.base_digest, "index_version": str(finetuned.index_version)}
        run_id = start_run(
            settings, EXPERIMENT, finetuned.name, {"base": finetuned.base}, tags, run_id=finetuned.run_id
        )
        client.set_terminated(run_id)
        run = client.get_run(run_id)
    return run


def log_model(
    client: "MlflowClient", run: Any, title: str, model: Path, parameters: Mapping[str, str]
) -> "LoggedModel":
    """Upload a model's folder as the output of a training's run, and return MLflow's record of it.

    Args:
        client: MLflow's client.
        run: run of the training.
        title: name of the record. A record of this name, which a killed call left, is used again.
        model: MLflow's folder of the model.
        parameters: parameters of the record.
    """
    from mlflow.entities import LoggedModelOutput

    experiments = [run.info.experiment_id]
    found = client.search_logged_models(experiments, f"name = '{title}'", max_results=1)
    logged = found[0] if found else client.create_logged_model(*experiments, title, run.info.run_id, params=parameters)
    client.log_model_artifacts(logged.model_id, str(model))
    client.finalize_logged_model(logged.model_id, "READY")
    if all(each.model_id != logged.model_id for each in client.get_run(run.info.run_id).outputs.model_outputs):
        client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged


def log_evaluation(client: "MlflowClient", model_id: str, run_id: str) -> None:
    """Link an evaluation's run to the model that it measured, and copy its metrics of this model. Idempotent."""
    from mlflow.entities import LoggedModelInput, Metric

    run = find_run(client, run_id)
    if run is None or any(each.model_id == model_id for each in run.inputs.model_inputs):
        return
    keys = [key for key in run.data.metrics if key.startswith(_OF_THE_CANDIDATE)]
    measured = [client.get_metric_history(run.info.run_id, key)[-1] for key in keys]
    metrics = [Metric(each.key, each.value, each.timestamp, each.step, model_id=model_id) for each in measured]
    client.log_batch(run.info.run_id, metrics)
    client.log_inputs(run.info.run_id, models=[LoggedModelInput(model_id)])
