"""Losses and pictures of a training, kept by MLflow. The only module of training that knows MLflow."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from PIL import Image


class Tracker(Protocol):
    """What keeps a training's results."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Keep numbers of one step."""

    def image(self, name: str, image: Image.Image) -> None:
        """Keep a picture under a name with an ending."""


class _MlflowTracker:
    def metrics(self, values: Mapping[str, float], step: int) -> None:
        import mlflow

        mlflow.log_metrics(dict(values), step=step)

    def image(self, name: str, image: Image.Image) -> None:
        import mlflow

        mlflow.log_image(image, name)


@contextmanager
def tracked(home: Path, experiment: str, run_name: str, parameters: Mapping[str, Any]) -> Iterator[Tracker]:
    """Open an MLflow run, in the store under `home`."""
    import os

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    folder = home.absolute() / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    if mlflow.get_experiment_by_name(experiment) is None:
        mlflow.create_experiment(experiment, artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name=run_name):
        mlflow.log_params(dict(parameters))
        yield _MlflowTracker()
