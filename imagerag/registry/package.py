"""A registered model's own folder: trained weights, and a manifest of everything its pictures depend on.

    imagerag.json       the manifest
    adapter/  lora/     safetensors
    index/              a copy of the index's version, if the model is portable

The base model is pinned by its digest and not included. All files are checked against the manifest's digests before
any is loaded.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from imagerag.artifacts import Finetuned
from imagerag.base.files import BaseFiles, resolve
from imagerag.errors import UserError
from imagerag.generation.finetuned import ADAPTER, LORA, load_finetuned
from imagerag.hspace.cache import identities_of, identity_of
from imagerag.retrieval.publish import move_tag
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.digests import sha256_of
from imagerag.storage.locks import local_folder

if TYPE_CHECKING:
    from imagerag.generation.pipeline import ImageRAGTurboPipeline
    from imagerag.retrieval.search import Retriever
    from imagerag.workers import Dtype

MANIFEST, INDEX = "imagerag.json", "index"
DISTRIBUTION = "imagerag-turbo"
_HUB = re.compile(r"(?P<id>[^/]+/[^/]+)@(?P<revision>[0-9a-f]{40})")
_WEIGHTS_SUFFIXES = (".json", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a picture depends on."""

    base_id: str
    """`tiny`, a hub id or a folder."""
    base_revision: str | None
    """Commit of a base model from the hub, otherwise None."""
    base_digest: str
    encoder_id: str
    """Encoder of the index."""
    encoder_digest: str
    index_uri: str
    """URI of the index at registration."""
    index_name: str
    index_version: int
    index_created_at: str
    portable: bool
    """Whether the folder has a copy of the index version, which is then used instead of `index_uri`."""
    features_digest: str
    training: str
    """Name of the training: a digest of all its inputs."""
    run_id: str
    """MLflow run of the training."""
    dtype: "Dtype" = "fp32"
    """Dtype to load the model in on every machine, so that all of them generate the same pictures."""
    packages: Mapping[str, str]
    """Versions of this package and its dependencies."""
    files: Mapping[str, str]
    """SHA-256 of every file but the manifest, by path."""

    @property
    def base(self) -> str:
        """The argument of `load_base`."""
        return self.base_id if self.base_revision is None else f"{self.base_id}@{self.base_revision}"

    @property
    def content(self) -> str:
        """A digest of the manifest without the index's URI, which may change, and without the files of its copy.

        Each copy has different files; the index is identified by its name, version and time of creation.
        """
        files = {path: digest for path, digest in self.files.items() if not path.startswith(f"{INDEX}/")}
        return hashlib.sha256(_to_json(replace(self, index_uri="", files=files))).hexdigest()

    @property
    def requirements(self) -> list[str]:
        """Exact versions for pip, of this package too, unless the model is portable and has a copy of it."""
        # Local versions (`2.13.0+cpu`) are builds that package indexes don't have.
        versions = {name: version.split("+")[0] for name, version in self.packages.items()}
        return [f"{name}=={own}" for name, own in versions.items() if not (self.portable and name == DISTRIBUTION)]


def pack(folder: Path, finetuned: Finetuned, retriever: "Retriever", *, portable: bool) -> Manifest:
    """Write the folder of a trained adapter with the index version that `retriever` has opened.

    `add_index` then adds the index of a portable model.

    Raises:
        UserError: if the base model differs from the one that the adapter was trained for, the index has no features of
            it, or the trained weights are not safetensors.
    """
    _copy_weights(finetuned.uri, folder)
    from imagerag.base.model import default_device, default_dtype

    base = resolve(finetuned.base)
    _check_base(base, finetuned.base_digest)
    features = identity_of(base, retriever.dataset.schema)
    retriever.count_without(features)  # raises if there are none
    hub = _HUB.fullmatch(base.identity.id)
    index_folder = local_folder(retriever.uri)
    manifest = Manifest(
        base_id=base.identity.id if hub is None else hub["id"],
        base_revision=None if hub is None else hub["revision"],
        base_digest=base.identity.digest,
        encoder_id=retriever.encoder.id,
        encoder_digest=retriever.encoder.digest,
        index_uri=retriever.uri if index_folder is None else str(index_folder.absolute()),
        index_name=retriever.name,
        index_version=retriever.version,
        index_created_at=Store(retriever.uri, retriever.name).created_at(retriever.version).isoformat(),
        portable=portable,
        features_digest=features.digest,
        training=finetuned.name,
        run_id=finetuned.run_id,
        dtype=default_dtype(default_device()),
        packages=_installed(),
        files=_digests(folder),
    )
    _write(folder, manifest)
    return manifest


def add_index(folder: Path, manifest: Manifest) -> Manifest:
    """Add a published copy of the index to a folder, and return the updated manifest."""
    store = Store(manifest.index_uri, manifest.index_name)
    move_tag(store.copy(manifest.index_version, str(folder / INDEX)), manifest.index_version)
    manifest = replace(manifest, files=_digests(folder))
    _write(folder, manifest)
    return manifest


def read(folder: Path) -> Manifest:
    """Return the manifest, after checking the folder's files against it.

    Raises:
        UserError: if a file is missing, changed or not listed, or the manifest can't be read.
    """
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"a registered model has {MANIFEST}, as this package writes it; {folder}: {error}") from error
    found = _digests(folder)
    for path in sorted(found.keys() | manifest.files.keys()):
        if found.get(path) != manifest.files.get(path):
            raise UserError(
                f"{folder / path} was changed after the model was registered: its SHA-256 is "
                f"{found.get(path, 'that of no file')}, and the manifest says {manifest.files.get(path, 'nothing')}. "
                "It is not used: register the model again"
            )
    return manifest


def load(folder: Path, device: str | None = None, dtype: "Dtype | None" = None) -> "ImageRAGTurboPipeline":
    """Load the pipeline of a registered model's folder.

    Args:
        folder: the model's own folder.
        device: torch device; by default as `load_base`.
        dtype: dtype instead of the manifest's; pictures are then not bit-for-bit the same.

    Raises:
        UserError: if a file was changed, or the base model or the index is not the pinned one.
    """
    from imagerag.base.model import load_base
    from imagerag.generation.pipeline import ImageRAGTurboPipeline

    manifest = read(folder)
    files = resolve(manifest.base)
    _check_base(files, manifest.base_digest)
    if manifest.features_digest not in {each.digest for each in identities_of(files).values()}:
        raise UserError(
            f"the model was registered with features of digest {manifest.features_digest}; this version of the package "
            f"makes others of the same base model: use {DISTRIBUTION} {manifest.packages[DISTRIBUTION]}"
        )
    base = load_base(manifest.base, device, dtype or manifest.dtype)
    pipeline = ImageRAGTurboPipeline.from_base(base, load_finetuned(folder, base))
    pipeline.set_progress_bar_config(disable=True)
    uri = str(folder / INDEX) if manifest.portable else _find_index(manifest)
    pipeline.use_index(uri, manifest.index_name, manifest.index_version)
    if not manifest.portable:
        _check_index(uri, manifest)
    return pipeline


def _check_base(base: BaseFiles, digest: str) -> None:
    if base.identity.digest != digest:
        raise UserError(
            f"the model was trained for a base model of digest {digest}; {base.identity.id} has the digest "
            f"{base.identity.digest} here: it is another one, or was changed"
        )


def _find_index(manifest: Manifest) -> str:
    """Return the URI of the pinned version: the recorded one, or this home's, which may have been moved since."""
    for uri in (manifest.index_uri, Settings().index_uri):
        store = Store(uri, manifest.index_name)
        with suppress(OSError):  # another machine's folder, or an unreachable store
            if store.has(manifest.index_version) and _made_at(store, manifest) == manifest.index_created_at:
                return uri
    return manifest.index_uri


def _made_at(store: Store, manifest: Manifest) -> str:
    return store.created_at(manifest.index_version).isoformat()


def _check_index(uri: str, manifest: Manifest) -> None:
    found = _made_at(Store(uri, manifest.index_name), manifest)
    if found != manifest.index_created_at:
        raise UserError(
            f"version {manifest.index_version} of the index {manifest.index_name!r} in {uri} is not the "
            f"pinned one: it was made {found}, and that {manifest.index_created_at}. The index was made anew since: "
            "register the model again on it"
        )


def _copy_weights(uri: str, folder: Path) -> None:
    filesystem, root = fsspec.url_to_fs(uri)
    for part in (ADAPTER, LORA):
        found = filesystem.find(f"{root}/{part}")
        if not found and part == ADAPTER:
            raise UserError(f"what is registered has a trained adapter; there is no {uri}/{ADAPTER}")
        for path in found:
            target = folder / part / path.removeprefix(f"{root}/{part}/")
            if target.suffix not in _WEIGHTS_SUFFIXES:
                raise UserError(f"trained weights are safetensors, described by JSON; {path} is neither")
            target.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(path, str(target))


def _installed() -> dict[str, str]:
    wanted = [each for each in metadata.requires(DISTRIBUTION) or [] if "extra ==" not in each]
    names = [re.split(r"[^\w.-]", each, maxsplit=1)[0] for each in wanted]
    return {name: metadata.version(name) for name in sorted([DISTRIBUTION, *names])}


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)


def _to_json(manifest: Manifest) -> bytes:
    values: dict[str, Any] = asdict(manifest)
    return json.dumps(values, indent=1, sort_keys=True).encode()


def _write(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_bytes(_to_json(manifest))
