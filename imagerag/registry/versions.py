"""Versions of registered models in MLflow: registration and look-up (`promotion` moves the champion).

`Settings.model_name` names the registered model. What concerns an index (takedowns, its champions, the check of all
versions) considers the versions of every registered model.

A tag of a version has the digest of its manifest, which has the digests of all files: a version without the tag, or
with different files, was not registered by this package and is not used. Versions are looked up by alias: `candidate`
is the last registered version, `champion` the one in use, `previous` the champion before it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from imagerag.artifacts import Finetuned, Registered
from imagerag.errors import UserError
from imagerag.registry import package
from imagerag.registry.card import GRID, PICTURE, model_card, sources_of
from imagerag.registry.lineage import log_evaluation, log_model, run_of
from imagerag.registry.model import FOLDER, code_digest, write_model
from imagerag.registry.package import Manifest
from imagerag.retrieval.pins import JOB, held, pin
from imagerag.retrieval.publish import require_published, require_version
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.digests import sha256_of
from imagerag.storage.locks import writer_lock
from imagerag.training.tracking import log_index, mlflow_client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

THE_GATE = "the gate"
"""Author of automatic promotions."""
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
TAG = "imagerag."
_MANIFEST_TAG, _CONTENT_TAG, CODE_TAG = f"{TAG}manifest", f"{TAG}content", f"{TAG}code"
_INDEX_KEYS = ("index_uri", "index_name", "index_version")
_PINNED = ("base", "base_digest", "encoder_id", *_INDEX_KEYS, "features_digest", "training", "portable")
"""Manifest fields copied to version tags, to view and search."""
_MAX_DESCRIPTION = 5_000
"""Maximum number of characters, from the column in MLflow's database."""
_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class VersionInfo:
    """A version of a registered model."""

    name: str
    """Name of the registered model."""
    version: int
    aliases: tuple[str, ...]
    created_at: datetime
    run_id: str
    """MLflow run of the training."""
    tags: Mapping[str, str]

    @property
    def signed(self) -> bool:
        """Whether this package registered it."""
        return _MANIFEST_TAG in self.tags

    @property
    def portable(self) -> bool:
        """Whether it includes a copy of its index."""
        return self.pinned("portable") == "True"

    @property
    def pin_label(self) -> str:
        """Label of the pin on its version of the index, see `retrieval.pins`."""
        return _pin_label(self.name, self.version, self.pinned("content"))

    def pinned(self, name: str) -> str:
        """Return a tag of this package by name: `base`, `index_name`, `index_version` etc.; empty if there is none."""
        return self.tags.get(TAG + name, "")


def register(
    finetuned: Finetuned,
    settings: Settings,
    *,
    index_version: int | None = None,
    results: str = "",
    grid: Path | None = None,
    evaluation_run: str | None = None,
    tags: Mapping[str, str] = MappingProxyType({}),
    portable: bool = False,
    flow_run_url: str | None = None,
) -> Registered:
    """Register a trained adapter with an index version as `candidate`.

    Registering the same content again returns the same version, with the tags and the description of its last
    evaluation. The index version is pinned in its store, so that later publications keep it.

    Args:
        finetuned: result of the training.
        settings: locations of MLflow and the index.
        index_version: version of the index; by default the published one.
        results: evaluation results for the model card, in markdown.
        grid: PNG file with a picture grid, for the model card.
        evaluation_run: MLflow run of the results, to link with the model.
        tags: tags of the version.
        portable: whether to include a copy of the index, for machines that can't reach the store.
        flow_run_url: URL of the flow run that registers it, for the version's description.

    Raises:
        UserError: if MLflow, the base model or the index is unavailable, or the adapter does not fit them.
    """
    from imagerag.retrieval.search import Retriever

    name, store = settings.model_name, Store(settings.index_uri, finetuned.index_name)
    tags = dict(tags) | ({} if evaluation_run is None else {f"{TAG}evaluation_run": evaluation_run})
    with writing_registry(settings) as client, TemporaryDirectory() as temporary:
        run = run_of(client, finetuned, settings)
        finetuned = replace(finetuned, run_id=run.info.run_id)
        index_version = require_published(store) if index_version is None else index_version
        require_version(store, index_version)
        with held(store, index_version, f"{JOB}registration-{finetuned.name}"):
            retriever = Retriever(store.uri, store.name, version=index_version)
            folder = Path(temporary, "package")
            manifest = package.pack(folder, finetuned, retriever, portable=portable)
            known = [each for each in versions_in(client, name) if each.tags.get(_CONTENT_TAG) == manifest.content]
            if known:
                version, model_id = known[0].version, known[0].pinned("logged_model")
                if evaluation_run is not None:
                    card = model_card(manifest, sources_of(retriever), results, has_grid=grid is not None)
                    _update(client, name, version, _description(card, flow_run_url), tags)
            else:
                manifest = package.add_index(folder, manifest) if portable else manifest
                card = model_card(manifest, sources_of(retriever), results, has_grid=grid is not None)
                model = write_model(Path(temporary, "model"), folder, manifest, card, grid)
                log_index(settings, finetuned.run_id, store, finetuned.index_version, "training")
                log_index(settings, finetuned.run_id, store, index_version, "retrieval")
                text = _description(card, flow_run_url)
                version, model_id = _create(client, name, run, model, manifest, text, tags)
            if evaluation_run is not None and model_id:  # versions of earlier releases have no logged model
                log_evaluation(client, model_id, evaluation_run)
            pin(store, index_version, _pin_label(name, version, manifest.content))
        aliases = aliases_of(client, name)
        if aliases.get(CANDIDATE) != version:
            client.set_registered_model_alias(name, CANDIDATE, str(version))
    return Registered(
        name=name,
        version=version,
        uri=f"models:/{name}/{version}",
        run_id=finetuned.run_id,
        is_new=not known,
        portable=portable,
        is_champion=aliases.get(CHAMPION) == version,
    )


def resolve_version(settings: Settings, alias_or_version: str) -> VersionInfo:
    """Return the version with this alias or number.

    Raises:
        UserError: if MLflow can't be used, or there is no such version.
    """
    with reading_registry(settings) as client:
        return find_version(client, settings.model_name, alias_or_version)


def list_versions(settings: Settings) -> list[VersionInfo]:
    """Return all versions of the registered model, newest first.

    Raises:
        UserError: if MLflow can't be used.
    """
    with reading_registry(settings) as client:
        return versions_in(client, settings.model_name)


def has_registry(settings: Settings) -> bool:
    """Return whether an MLflow server is configured or a local database exists; creates none."""
    return settings.mlflow_tracking_uri is not None or (settings.home / "mlflow" / "mlflow.db").is_file()


def versions_of_index(settings: Settings, index_name: str) -> list[VersionInfo]:
    """Return the versions of all models that use an index, newest first; creates no MLflow database.

    Raises:
        UserError: if MLflow can't be used.
    """
    if not has_registry(settings):
        return []
    with reading_registry(settings) as client:
        return versions_on(client, index_name)


@contextmanager
def reading_registry(settings: Settings) -> Iterator["MlflowClient"]:
    """Yield MLflow's client.

    Raises:
        UserError: if MLflow can't be used.
    """
    uri = tracking_uri(settings)
    try:
        client = mlflow_client(uri)
        client.search_registered_models(max_results=1)
    except Exception as error:
        raise UserError(f"MLflow at {uri} can't be used: {error}") from error
    yield client


@contextmanager
def writing_registry(settings: Settings) -> Iterator["MlflowClient"]:
    """Yield MLflow's client, and hold a lock on versions and aliases against processes with the same `training_uri`.

    MLflow itself has no locks.
    """
    with writer_lock(settings.training_uri, "registry"), reading_registry(settings) as client:
        yield client


def versions_in(client: "MlflowClient", name: str) -> list[VersionInfo]:
    """Return all versions of a model, newest first."""
    return _search(client, f"name = '{name}'")


def versions_on(client: "MlflowClient", index_name: str) -> list[VersionInfo]:
    """Return the versions of all models that use an index, newest first."""
    return _search(client, f"tags.`{TAG}index_name` = '{index_name}'")


def every_version(client: "MlflowClient") -> list[VersionInfo]:
    """Return all versions that this package registered, of all models, newest first."""
    return _search(client, f"tags.`{_MANIFEST_TAG}` LIKE '%'")


def _search(client: "MlflowClient", condition: str) -> list[VersionInfo]:
    found = client.search_model_versions(condition)
    aliases = {name: aliases_of(client, name) for name in {each.name for each in found}}
    infos = [
        VersionInfo(
            name=each.name,
            version=int(each.version),
            aliases=tuple(sorted(alias for alias, of in aliases[each.name].items() if of == int(each.version))),
            created_at=datetime.fromtimestamp(each.creation_timestamp / 1000, UTC),
            run_id=each.run_id or "",
            tags=dict(each.tags),
        )
        for each in found
    ]
    return sorted(infos, key=lambda info: (info.name, -info.version))


def aliases_of(client: "MlflowClient", name: str) -> dict[str, int]:
    """Return the version of each alias of a model."""
    found = client.search_registered_models(f"name = '{name}'")
    return {alias: int(version) for model in found for alias, version in model.aliases.items()}


def find_version(client: "MlflowClient", name: str, alias_or_version: str) -> VersionInfo:
    """Return the version of a model with this alias or number; raises a `UserError` if there is none."""
    infos = versions_in(client, name)
    for info in infos:
        if alias_or_version in (str(info.version), *info.aliases):
            return info
    if not infos:
        raise UserError(f"no version of {name} is registered yet; asked for {alias_or_version!r}")
    numbers = ", ".join(str(info.version) for info in reversed(infos))
    aliases = ", ".join(sorted(alias for info in infos for alias in info.aliases)) or "none"
    raise UserError(f"{name} has no version or alias {alias_or_version!r}; versions: {numbers}; aliases: {aliases}")


def _pin_label(name: str, version: int, content: str) -> str:
    return f"{name}-{version}-{content[:_DIGITS]}"


def check_signed(info: VersionInfo) -> str:
    """Return the digest of the version's manifest.

    Raises:
        UserError: if it has no digest, so that this package did not register it.
    """
    if not info.signed:
        raise UserError(
            f"version {info.version} of {info.name} has no tag {_MANIFEST_TAG}, so it was not registered by this "
            "package, and nothing tells what is in it: it is not used"
        )
    return info.tags[_MANIFEST_TAG]


def _description(card: str, flow_run_url: str | None) -> str:
    """Return a model card as a version's description; MLflow's descriptions can't embed artifacts."""
    text = card.replace(PICTURE, f"Pictures of each prompt: `{GRID}` among the artifacts of the logged model.")
    if flow_run_url is not None:
        text = f"Registered by [a flow run]({flow_run_url}).\n\n{text}"
    return text if len(text) <= _MAX_DESCRIPTION else f"{text[: _MAX_DESCRIPTION - 1]}…"


def _update(client: "MlflowClient", name: str, version: int, description: str, tags: Mapping[str, str]) -> None:
    """Replace a version's description, and add tags."""
    client.update_model_version(name, str(version), description)
    for key, value in tags.items():
        client.set_model_version_tag(name, str(version), key, value)


def _create(
    client: "MlflowClient",
    name: str,
    run: Any,
    model: Path,
    manifest: Manifest,
    description: str,
    tags: Mapping[str, str],
) -> tuple[int, str]:
    """Create a version, and return its number and the id of its logged model."""
    from mlflow.exceptions import MlflowException

    digest = sha256_of(model / FOLDER / package.MANIFEST)
    pinned = {key: str(getattr(manifest, key)) for key in _PINNED}
    logged = log_model(client, run, f"{name}-{digest[:_DIGITS]}", model, pinned)
    try:
        client.create_registered_model(name, description="One-step text-to-image generation with references")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    digests = {_MANIFEST_TAG: digest, _CONTENT_TAG: manifest.content, CODE_TAG: code_digest(model)}
    named = {f"{TAG}{key}": value for key, value in (pinned | {"logged_model": logged.model_id}).items()}
    made = client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=run.info.run_id,
        tags=dict(tags) | named | digests,
        description=description,
        model_id=logged.model_id,
    )
    # MLflow's server sets this tag itself; without a server, nothing would lead from the model to its version.
    versions = json.dumps([{"name": name, "version": int(made.version)}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": versions})
    return int(made.version), logged.model_id
