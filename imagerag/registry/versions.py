"""Versions of the registered model in MLflow: registration and look-up (`promotion` moves the champion).

A tag of a version has the digest of its manifest, which has the digests of all files: a version without the tag, or
with different files, was not registered by this package and is not used. Versions are looked up by alias: `candidate`
is the last registered version, `champion` the one in use, `previous` the champion before it.
"""

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
from imagerag.registry.lineage import log_inputs, run_of
from imagerag.registry.model import code_digest, write_model
from imagerag.registry.package import Manifest
from imagerag.retrieval.pins import JOB, held, pin
from imagerag.retrieval.publish import require_published, require_version
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.digests import sha256_of
from imagerag.storage.locks import writer_lock
from imagerag.training.tracking import mlflow_client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_NAME = "imagerag-turbo"
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
    """A version of the registered model."""

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
        return _pin_label(self.version, self.pinned("content"))

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
    tags: Mapping[str, str] = MappingProxyType({}),
    portable: bool = False,
    flow_run_url: str | None = None,
) -> Registered:
    """Register a trained adapter with an index version as `candidate`.

    Registering the same content again returns the same version. The index version is pinned in its store, so that later
    publications keep it.

    Args:
        finetuned: result of the training.
        settings: locations of MLflow and the index.
        index_version: version of the index; by default the published one.
        results: evaluation results for the model card, in markdown.
        grid: PNG file with a picture grid, for the model card.
        tags: tags of a new version.
        portable: whether to include a copy of the index, for machines that can't reach the store.
        flow_run_url: URL of the flow run that registers it, for the version's description.

    Raises:
        UserError: if MLflow, the base model or the index is unavailable, or the adapter does not fit them.
    """
    from imagerag.retrieval.search import Retriever

    store = Store(settings.index_uri, finetuned.index_name)
    with writing_registry(settings) as client, TemporaryDirectory() as temporary:
        run = run_of(client, finetuned, settings)
        finetuned = replace(finetuned, run_id=run.info.run_id)
        index_version = require_published(store) if index_version is None else index_version
        require_version(store, index_version)
        with held(store, index_version, f"{JOB}registration-{finetuned.name}"):
            retriever = Retriever(store.uri, store.name, version=index_version)
            folder = Path(temporary, "package")
            manifest = package.pack(folder, finetuned, retriever, portable=portable)
            known = [each for each in versions_in(client) if each.tags.get(_CONTENT_TAG) == manifest.content]
            if known:
                version = known[0].version
            else:
                manifest = package.add_index(folder, manifest) if portable else manifest
                card = model_card(manifest, sources_of(retriever), results, has_grid=grid is not None)
                model = write_model(Path(temporary, "model"), folder, manifest, card, grid)
                log_inputs(client, finetuned, manifest)
                version = _create(client, run, model, folder, manifest, card, tags, flow_run_url)
            pin(store, index_version, _pin_label(version, manifest.content))
        if aliases_of(client).get(CANDIDATE) != version:
            client.set_registered_model_alias(MODEL_NAME, CANDIDATE, str(version))
    return Registered(
        name=MODEL_NAME,
        version=version,
        uri=f"models:/{MODEL_NAME}/{version}",
        run_id=finetuned.run_id,
        is_new=not known,
        portable=portable,
    )


def resolve_version(settings: Settings, alias_or_version: str) -> VersionInfo:
    """Return the version with this alias or number.

    Raises:
        UserError: if MLflow can't be used, or there is no such version.
    """
    with reading_registry(settings) as client:
        return find_version(client, alias_or_version)


def list_versions(settings: Settings) -> list[VersionInfo]:
    """Return all versions, newest first.

    Raises:
        UserError: if MLflow can't be used.
    """
    with reading_registry(settings) as client:
        return versions_in(client)


def has_registry(settings: Settings) -> bool:
    """Return whether an MLflow server is configured or a local database exists; creates none."""
    return settings.mlflow_tracking_uri is not None or (settings.home / "mlflow" / "mlflow.db").is_file()


def versions_of_index(settings: Settings, index_name: str) -> list[VersionInfo]:
    """Return the versions that use an index, newest first; creates no MLflow database.

    Raises:
        UserError: if MLflow can't be used.
    """
    if not has_registry(settings):
        return []
    return [info for info in list_versions(settings) if info.pinned("index_name") == index_name]


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


def versions_in(client: "MlflowClient") -> list[VersionInfo]:
    """Return all versions, newest first."""
    names: dict[int, list[str]] = {}
    for alias, version in sorted(aliases_of(client).items()):
        names.setdefault(version, []).append(alias)
    found = client.search_model_versions(f"name = '{MODEL_NAME}'")
    infos = [
        VersionInfo(
            version=int(each.version),
            aliases=tuple(names.get(int(each.version), ())),
            created_at=datetime.fromtimestamp(each.creation_timestamp / 1000, UTC),
            run_id=each.run_id or "",
            tags=dict(each.tags),
        )
        for each in found
    ]
    return sorted(infos, key=lambda info: -info.version)


def aliases_of(client: "MlflowClient") -> dict[str, int]:
    """Return the version of each alias."""
    found = client.search_registered_models(f"name = '{MODEL_NAME}'")
    return {alias: int(version) for model in found for alias, version in model.aliases.items()}


def find_version(client: "MlflowClient", alias_or_version: str) -> VersionInfo:
    """Return the version with this alias or number; raises a `UserError` if there is none."""
    infos = versions_in(client)
    for info in infos:
        if alias_or_version in (str(info.version), *info.aliases):
            return info
    if not infos:
        raise UserError(f"no version of {MODEL_NAME} is registered yet; asked for {alias_or_version!r}")
    numbers = ", ".join(str(info.version) for info in reversed(infos))
    aliases = ", ".join(sorted(alias for info in infos for alias in info.aliases)) or "none"
    raise UserError(
        f"{MODEL_NAME} has no version or alias {alias_or_version!r}; versions: {numbers}; aliases: {aliases}"
    )


def _pin_label(version: int, content: str) -> str:
    return f"{MODEL_NAME}-{version}-{content[:_DIGITS]}"


def check_signed(info: VersionInfo) -> str:
    """Return the digest of the version's manifest.

    Raises:
        UserError: if it has no digest, so that this package did not register it.
    """
    if not info.signed:
        raise UserError(
            f"version {info.version} of {MODEL_NAME} has no tag {_MANIFEST_TAG}, so it was not registered by this "
            "package, and nothing tells what is in it: it is not used"
        )
    return info.tags[_MANIFEST_TAG]


def _create(
    client: "MlflowClient",
    run: Any,
    model: Path,
    folder: Path,
    manifest: Manifest,
    card: str,
    tags: Mapping[str, str],
    flow_run_url: str | None,
) -> int:
    from mlflow.exceptions import MlflowException

    digest = sha256_of(folder / package.MANIFEST)
    # A separate folder: a run may have several versions, and files of a killed call must not get into one.
    place = f"models/{digest[:_DIGITS]}"
    client.log_artifacts(run.info.run_id, str(model), place)
    # MLflow's descriptions can't embed artifacts.
    text = card.replace(PICTURE, f"Pictures of each prompt: `{GRID}` among the source run's artifacts.")
    if flow_run_url is not None:
        text = f"Registered by [a flow run]({flow_run_url}).\n\n{text}"
    try:
        client.create_registered_model(MODEL_NAME, description="One-step text-to-image generation with references")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    digests = {_MANIFEST_TAG: digest, _CONTENT_TAG: manifest.content, CODE_TAG: code_digest(model)}
    pinned = {TAG + name: str(getattr(manifest, name)) for name in _PINNED}
    made = client.create_model_version(
        MODEL_NAME,
        source=f"{run.info.artifact_uri}/{place}",
        run_id=run.info.run_id,
        tags=dict(tags) | pinned | digests,
        description=text if len(text) <= _MAX_DESCRIPTION else f"{text[: _MAX_DESCRIPTION - 1]}…",
    )
    return int(made.version)
