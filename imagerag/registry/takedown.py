"""Takedown of images in MLflow: result pages and pictures of runs, and models with a copy of the index."""

from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imagerag.artifacts import Sweep
from imagerag.registry.card import GRID
from imagerag.registry.model import FOLDER
from imagerag.registry.package import INDEX
from imagerag.registry.removal import delete_files, remove_version
from imagerag.registry.versions import (
    VersionInfo,
    has_registry,
    versions_on,
    writing_registry,
)
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import holds
from imagerag.settings import Settings
from imagerag.storage.locks import local_folder
from imagerag.training.finetune import EXPERIMENT

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PAGES = ("index.html", GRID)
_VALIDATION = "validation"


def sweep_models(
    settings: Settings, name: str, ids: pa.Array, evaluation_runs: Collection[str], training_sets: Collection[str]
) -> Sweep:
    """Delete artifacts in MLflow that show taken-down rows, and report copies that can't be deleted.

    Args:
        settings: location of MLflow.
        name: name of the corpus.
        ids: ids of the rows.
        evaluation_runs: ids of evaluation runs whose pages show one of the rows.
        training_sets: names of reference tables that list one of the rows.

    Raises:
        UserError: if MLflow can't be used.
    """
    if not has_registry(settings):
        return Sweep()
    with writing_registry(settings) as client:
        versions = versions_on(client, name)
        sweeps = [
            _sweep(settings, f"MLflow run {run_id}: {each}", f"{uri}/{each}")
            for run_id, uri, found in _artifacts(client, evaluation_runs, training_sets)
            for each in found
        ]
        for info in versions:
            source = client.get_model_version_download_uri(info.name, str(info.version))
            if info.pinned("evaluation_run") in evaluation_runs:
                sweeps.append(_sweep(settings, f"{info.name} {info.version}: {GRID}", f"{source}/{GRID}"))
            if info.portable:
                sweeps.append(_sweep_portable(client, settings, info, source, ids))
    return Sweep.merged(sweeps)


def _artifacts(
    client: "MlflowClient", evaluation_runs: Collection[str], training_sets: Collection[str]
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield the id and artifact URI of runs, with the names of the artifacts to delete."""
    from mlflow.exceptions import MlflowException

    for run_id in evaluation_runs:
        with suppress(MlflowException):  # the run may be lost
            yield run_id, client.get_run(run_id).info.artifact_uri, _PAGES
    for run in _trainings(client):
        if run.data.tags.get("references_uri", "").rsplit("/", 1)[-1] in training_sets:
            yield run.info.run_id, run.info.artifact_uri, (_VALIDATION,)


def _trainings(client: "MlflowClient") -> Iterator[Any]:
    """Yield the runs of all trainings, including deleted ones, whose artifacts may still exist."""
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(EXPERIMENT)
    token: str | None = "" if experiment is not None else None
    while token is not None:
        page = client.search_runs(
            [experiment.experiment_id], run_view_type=ViewType.ALL, max_results=1_000, page_token=token or None
        )
        yield from page
        token = page.token or None


def _sweep(settings: Settings, what: str, uri: str) -> Sweep:
    try:
        return Sweep(deleted=(what,)) if delete_files(settings, uri) else Sweep()
    except Exception as error:  # noqa: BLE001 - artifact stores raise their own exceptions; reported for a person to fix
        return Sweep(left=(f"{what} can't be deleted from {uri}: {error}",))


def _sweep_portable(client: "MlflowClient", settings: Settings, info: VersionInfo, source: str, ids: pa.Array) -> Sweep:
    named = f"version {info.version} of {info.name}"
    copies = f"whoever pulled or downloaded {named} has a copy of version {info.pinned('index_version')} of the index"
    folder = local_folder(source)
    if folder is None:
        return Sweep(left=(f"{named} is portable: if its index had the rows, `imagerag models remove`; {copies}",))
    copy = Store(str(folder / FOLDER / INDEX), info.pinned("index_name"))
    dataset = copy.find()
    if dataset is None or not holds(dataset, ids):
        return Sweep()
    remove_version(client, settings, info)
    aliases = f", which was {' and '.join(info.aliases)}" if info.aliases else ""
    return Sweep(deleted=(f"{named}{aliases}, with its copy of the index",), left=(copies,))
