"""Experiment tracking with MLflow. The only module of `training` that imports MLflow."""

import hashlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, Self

from PIL import Image

from imagerag.errors import UserError
from imagerag.settings import Settings
from imagerag.storage.files import read_json, write_json
from imagerag.training.databases import ARTIFACTS, configure_mlflow, runs_database

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from imagerag.retrieval.store import Store

logger = logging.getLogger(__name__)

_PARENT, _GROUP = "mlflow.parentRunId", "imagerag.group"
CONTINUES = "imagerag.continues"
"""Tag of a run that replaces a lost run, with the lost run's id."""
_RETRY_AFTER_S = 5.0
_LEFT_AT_END_S = 60.0
_FLUSH_S = 10.0
_DIGITS = 16
_REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's answers to what it will never take: for a run that was deleted, or a value that breaks a rule. BAD_REQUEST
is not among them: it also means errors of MLflow's database."""


class Tracker(Protocol):
    """Logs metrics and images of a training."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step."""

    def image(self, name: str, image: Image.Image) -> None:
        """Log an image; the suffix of `name` determines its format."""


class MlflowTracker:
    """Logs to an MLflow run from a background thread.

    If MLflow can't be reached, entries are queued in memory and sent again later; the training does not wait. Entries
    that MLflow refuses, for example because the run was deleted, are dropped.
    """

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._client, self._run_id = mlflow_client(tracking_uri), run_id
        self._waiting: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._refused: set[str] = set()
        self._lost = threading.Event()
        """Set while MLflow can't be reached."""
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()
        # An earlier attempt may have ended the run as failed.
        self._waiting.put(partial(self._client.update_run, run_id, status="RUNNING"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("FINISHED" if kind is None else "FAILED")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(name, value, now, step) for name, value in values.items()]
        self._waiting.put(partial(self._client.log_batch, self._run_id, metrics=batch))

    def image(self, name: str, image: Image.Image) -> None:
        """Log an image; the suffix of `name` determines its format."""
        self._waiting.put(partial(self._client.log_image, self._run_id, image, artifact_file=name))

    def tag(self, name: str, value: str) -> None:
        """Set a tag, replacing an earlier value."""
        self._waiting.put(partial(self._client.set_tag, self._run_id, name, value))

    def file(self, name: str, content: bytes) -> None:
        """Log a file as an artifact."""
        self._waiting.put(partial(self._log_file, name, content))

    def _log_file(self, name: str, content: bytes) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            self._client.log_artifact(self._run_id, str(path))

    def flush(self) -> None:
        """Wait until all entries are sent, so that a process that is killed afterwards does not lose them.

        Waits at most ten seconds, and not at all while MLflow can't be reached.
        """
        sent, deadline = threading.Event(), time.monotonic() + _FLUSH_S
        self._waiting.put(sent.set)
        while not sent.wait(0.02) and not self._lost.is_set() and time.monotonic() < deadline:
            pass

    def close(self, status: str = "FINISHED") -> None:
        """End the run once all entries are sent; give up after one minute."""
        self._waiting.put(partial(self._client.set_terminated, self._run_id, status))
        self._waiting.put(None)
        self._thread.join(_LEFT_AT_END_S)
        if self._thread.is_alive():
            logger.warning("MLflow could not be reached again: %s entries of the run are lost", self._waiting.qsize())

    def _send_all(self) -> None:
        while (send := self._waiting.get()) is not None:
            self._send(send)

    def _send(self, send: Callable[[], object]) -> None:
        """Send an entry, until MLflow takes or refuses it."""
        while True:
            try:
                send()
            except Exception as error:  # noqa: BLE001 - no tracking error may stop a training
                code = getattr(error, "error_code", None)
                if code in _REFUSALS:
                    if code not in self._refused:
                        logger.warning("MLflow refuses an entry of the run; such entries are dropped: %s", error)
                    self._refused.add(code)
                    self._lost.clear()
                    return
                if not self._lost.is_set():
                    logger.warning("MLflow can't be reached; entries are queued: %s", error)
                self._lost.set()
                time.sleep(_RETRY_AFTER_S)
            else:
                self._lost.clear()
                return


def start_run(
    settings: Settings,
    experiment: str,
    run_name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    *,
    run_id: str | None = None,
    group: str | None = None,
) -> str:
    """Start a run, or resume the run `run_id`, and return its id.

    If MLflow lost the run, for example after its database was restored, one new run replaces it and names it in the tag
    `CONTINUES`.

    Args:
        settings: location of MLflow.
        experiment: name of the experiment; created if it does not exist.
        run_name: display name of the run.
        parameters: parameters to log.
        tags: tags to set.
        run_id: id of a run to resume.
        group: name of the parent run; created if it does not exist.

    Raises:
        UserError: if MLflow can't be reached.
    """
    uri = tracking_uri(settings)
    client = mlflow_client(uri)
    try:
        if run_id is not None and (known := find_run(client, run_id)) is not None:
            client.update_run(known.info.run_id, status="RUNNING")
            return str(known.info.run_id)
        found = client.get_experiment_by_name(experiment)
        location = None if settings.mlflow_tracking_uri else (settings.home / ARTIFACTS).as_uri()
        number = found.experiment_id if found else client.create_experiment(experiment, artifact_location=location)
        parent = {} if group is None else {_PARENT: _group(client, number, group)}
        lost = {} if run_id is None else {CONTINUES: run_id}
        run = client.create_run(number, run_name=run_name, tags=dict(tags or {}) | parent | lost)
        for name, value in parameters.items():
            client.log_param(run.info.run_id, name, value)
        started: str = run.info.run_id
    except Exception as error:
        raise UserError(f"MLflow at {uri} can't be used: {error}") from error
    return started


def find_run(client: "MlflowClient", run_id: str) -> Any:
    """Return a run, or the run that replaced it; None if there is neither."""
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):
        run = client.get_run(run_id)
        if run.info.lifecycle_stage == "active":
            return run
    experiments = [each.experiment_id for each in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`{CONTINUES}` = '{run_id}'", max_results=1)
    return found[0] if found else None


def lasting_run(
    path: str,
    settings: Settings,
    experiment: str,
    run_name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    *,
    group: str | None = None,
) -> str:
    """Start a run, or resume the run whose id is stored in the file `path`, and return its id.

    Args:
        path: file that stores the run's id, so that a restarted job resumes its run.
        settings: location of MLflow.
        experiment: name of the experiment; created if it does not exist.
        run_name: display name of the run.
        parameters: parameters to log.
        tags: tags to set.
        group: name of the parent run; created if it does not exist.

    Raises:
        UserError: if MLflow can't be reached.
    """
    known = (read_json(path) or {}).get("run_id")
    run_id = start_run(settings, experiment, run_name, parameters, tags, run_id=known, group=group)
    write_json(path, {"run_id": run_id})
    return run_id


def log_index(settings: Settings, run_id: str, store: "Store", version: int, context: str) -> None:
    """Log a version of an index as a dataset input of a run. Idempotent.

    Args:
        settings: location of MLflow.
        run_id: id of the run.
        store: the index.
        version: its version, which may be deleted already.
        context: what the run uses it for, such as `training`.

    Raises:
        UserError: if MLflow can't be used.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = hashlib.sha256(f"{store.table_uri}\0{version}".encode()).hexdigest()[:_DIGITS]
    source = json.dumps({"uri": store.table_uri, "version": version})
    dataset = Dataset(f"{store.name}-v{version}", digest, source_type="lance", source=source)
    uri = tracking_uri(settings)
    try:
        mlflow_client(uri).log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
    except Exception as error:
        raise UserError(f"MLflow at {uri} can't be used: {error}") from error


def _group(client: "MlflowClient", experiment_id: str, name: str) -> str:
    """Return the id of a group's parent run; create it if it does not exist."""
    quoted = name.replace("'", "")
    found = client.search_runs([experiment_id], f"tags.`{_GROUP}` = '{quoted}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    run = client.create_run(experiment_id, run_name=name, tags={_GROUP: quoted})
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def tracking_uri(settings: Settings) -> str:
    """Return MLflow's tracking URI: the configured server, or a SQLite database in the home."""
    if settings.mlflow_tracking_uri is not None:
        return settings.mlflow_tracking_uri
    return f"sqlite:///{runs_database(settings.home)}"


@contextmanager
def tracked(settings: Settings, experiment: str, run_name: str, parameters: Mapping[str, Any]) -> Iterator[Tracker]:
    """Open an MLflow run that ends with the context."""
    with MlflowTracker(tracking_uri(settings), start_run(settings, experiment, run_name, parameters)) as tracker:
        yield tracker


def mlflow_client(uri: str) -> "MlflowClient":
    """Return an MLflow client for a tracking URI; its server need not be reachable."""
    configure_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(uri)
