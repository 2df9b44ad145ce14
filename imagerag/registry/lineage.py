"""Where a version comes from: its training's run, and the index's versions among that run's inputs."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from imagerag.artifacts import Finetuned
from imagerag.errors import UserError
from imagerag.registry.package import Manifest
from imagerag.retrieval.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DIGITS = 16


def run_of(client: "MlflowClient", run_id: str) -> Any:
    """Return a training's run.

    Raises:
        UserError: if MLflow has none.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        raise UserError(
            f"a version belongs to its training's run; MLflow has no run {run_id!r}: register it where it was trained"
        ) from error


def log_inputs(client: "MlflowClient", finetuned: Finetuned, manifest: Manifest) -> None:
    """Name the index's versions among the inputs of the training's run."""
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
