"""Removal of versions of the registered model, by number or by a limit, and the space that it frees.

A version pins a version of its index, and has files in MLflow. The automation registers one a night, so without a limit
the disk would fill up. Versions with an alias, and those that people promoted or rolled back, are kept.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagerag.errors import UserError
from imagerag.registry.versions import (
    TAG,
    THE_GATE,
    VersionInfo,
    find_version,
    versions_in,
    writing_registry,
)
from imagerag.retrieval.pins import unpin
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training.tracking import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_KEPT = 10
_KEEP_TAG = f"{TAG}keep_models"
"""Tag of a registered model with the number of versions to keep. Runs that an automation starts do not give one."""


@dataclass(frozen=True, kw_only=True)
class Removed:
    """A removed version."""

    version: int
    num_bytes: int
    """Size of its files."""
    index: str
    """Version and name of the index that it pinned; the next publication of the index deletes its files."""


def remove(settings: Settings, version: int) -> Removed:
    """Remove a version, its files and its pin. Call it again if it was killed.

    Raises:
        UserError: if MLflow can't be used, there is no such version, or it has an alias.
    """
    with writing_registry(settings) as client:
        info = find_version(client, settings.model_name, str(version))
        if info.aliases:
            raise UserError(
                f"version {version} of {info.name} is {' and '.join(info.aliases)}, which others ask for: let another "
                "version be that first (`imagerag promote`)"
            )
        return remove_version(client, settings, info)


def prune(settings: Settings, keep: int | None) -> list[Removed]:
    """Remove old versions: all but the `keep` newest, not counting those with an alias or a person's decision.

    Args:
        settings: location of MLflow.
        keep: number of versions; None for that of the last call which gave one, or 10.

    Raises:
        UserError: if MLflow can't be used.
    """
    name = settings.model_name
    with writing_registry(settings) as client:
        infos = versions_in(client, name)
        if not infos:
            return []
        if keep is None:
            keep = int(client.get_registered_model(name).tags.get(_KEEP_TAG, _KEPT))
        else:
            client.set_registered_model_tag(name, _KEEP_TAG, str(keep))
        unnamed = [info for info in infos if info.signed and not _is_named(info)]
        return [remove_version(client, settings, info) for info in unnamed[keep:]]


def remove_version(client: "MlflowClient", settings: Settings, info: VersionInfo) -> Removed:
    """Remove a version, even if it has aliases."""
    from mlflow.exceptions import MlflowException

    store = Store(info.pinned("index_uri"), info.pinned("index_name"))
    if info.signed and store.exists:
        unpin(store, info.pin_label)
    source = client.get_model_version_download_uri(info.name, str(info.version))
    num_bytes = sum(size for _, size in files_of(settings, source))
    delete_files(settings, source)
    if logged_model := info.pinned("logged_model"):
        with suppress(MlflowException):  # a killed call deleted it
            client.delete_logged_model(logged_model)
    client.delete_model_version(info.name, str(info.version))
    index = f"{info.pinned('index_version')} of {store.name!r}"
    return Removed(version=info.version, num_bytes=num_bytes, index=index)


def files_of(settings: Settings, uri: str) -> Iterator[tuple[str, int]]:
    """Yield path and size in bytes of every artifact below a URI."""
    repository = _repository(settings, uri)
    folders: list[str | None] = [None]
    while folders:
        for each in repository.list_artifacts(folders.pop()):
            if each.is_dir:
                folders.append(each.path)
            else:
                yield each.path, int(each.file_size or 0)


def delete_files(settings: Settings, uri: str) -> bool:
    """Delete an artifact or a folder of artifacts, and return whether it existed."""
    folder, name = uri.rstrip("/").rsplit("/", 1)
    repository = _repository(settings, folder)
    found = any(each.path == name for each in repository.list_artifacts())
    if found:
        repository.delete_artifacts(name)
    return found


def _is_named(info: VersionInfo) -> bool:
    by_people = info.pinned("promoted_by") not in ("", THE_GATE) or bool(info.pinned("rolled_back_by"))
    return bool(info.aliases) or by_people


def _repository(settings: Settings, uri: str) -> Any:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(uri, tracking_uri=tracking_uri(settings))
