"""Lineage of a version: its training's MLflow run, with the versions of the index as inputs."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from imagerag.artifacts import Finetuned
from imagerag.registry.package import Manifest
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training.finetune import EXPERIMENT
from imagerag.training.tracking import find_run, start_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DIGITS = 16


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


def log_inputs(client: "MlflowClient", finetuned: Finetuned, manifest: Manifest) -> None:
    """Log the versions of the index as dataset inputs of the training's run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    uses = {manifest.index_version: "retrieval", finetuned.index_version: "training"}
    inputs = []
    for version, context in uses.items():
        source = Store(manifest.index_uri, manifest.index_name).table_uri
        digest = hashlib.sha256(f"{source}\0{version}".encode()).hexdigest()[:_DIGITS]
        named = json.dumps({"uri": source, "version": version})
        dataset = Dataset(f"{manifest.index_name}-v{version}", digest, source_type="lance", source=named)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    client.log_inputs(finetuned.run_id, inputs)
