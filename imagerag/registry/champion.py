"""The current champion as a baseline of an evaluation: its own weights with its own index."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec

from imagerag.artifacts import CachedFeatures, Deployed, Finetuned
from imagerag.registry import package
from imagerag.registry.fetch import download
from imagerag.registry.versions import CHAMPION, VersionInfo, list_versions, versions_of_index
from imagerag.retrieval.publish import require_published
from imagerag.retrieval.store import Store
from imagerag.settings import Settings

_DIGITS = 16


@dataclass(frozen=True)
class Champion:
    """The champion, if its weights or index differ from the candidate's."""

    version: int
    deployed: Deployed | None
    """None if it has another base model, and so can't be compared."""
    is_same_weights: bool
    """Whether it has the candidate's weights, so that only the index differs."""


def present_champion(settings: Settings, finetuned: Finetuned) -> Champion | None:
    """Fetch and verify the champion; None if there is none, or if it has the candidate's weights and index.

    Raises:
        UserError: if MLflow can't be used, nothing is published, or the champion's files were changed.
    """
    info = next((each for each in list_versions(settings) if CHAMPION in each.aliases), None)
    if info is None:
        return None
    store = Store(settings.index_uri, finetuned.index_name)
    present = store.index_version(require_published(store))
    is_same_weights = info.pinned("training") == finetuned.name
    name, version = info.pinned("index_name"), int(info.pinned("index_version"))
    if is_same_weights and (name, version) == (present.name, present.version):
        return None
    if info.pinned("base_digest") != finetuned.base_digest:
        return Champion(info.version, None, is_same_weights)
    folder = _shared_copy(settings, info, finetuned.index_name)
    # The index at its recorded URI, or in this home, which may have been moved since.
    uris = [f"{folder}/{package.INDEX}"] if info.portable else [info.pinned("index_uri"), settings.index_uri]
    own = next((each for each in (Store(uri, name) for uri in uris) if each.has(version)), None)
    # If a takedown deleted its version of the index, the only one left to use is the published version.
    index = present if own is None else own.index_version(version)
    return Champion(info.version, Deployed(folder=folder, index=index), is_same_weights)


def _shared_copy(settings: Settings, info: VersionInfo, index_name: str) -> str:
    """Return a copy of the model's own folder that all workers can read, in the folder of trainings."""
    shared = f"{settings.training_of(index_name)}/champions/{info.version}-{info.pinned('content')[:_DIGITS]}"
    filesystem, path = fsspec.url_to_fs(shared)
    if not filesystem.exists(f"{path}/{package.MANIFEST}"):
        with TemporaryDirectory() as temporary:
            folder = download(settings, info.version, Path(temporary, "model"))
            manifest = folder / package.MANIFEST
            for file in sorted(each for each in folder.rglob("*") if each.is_file() and each != manifest):
                _put(filesystem, file, f"{path}/{file.relative_to(folder).as_posix()}")
            _put(filesystem, manifest, f"{path}/{package.MANIFEST}")  # last: its presence marks a complete folder
    return shared


def _put(filesystem: Any, file: Path, path: str) -> None:
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    filesystem.put_file(str(file), path)


def champions_behind(settings: Settings, cached: CachedFeatures, index_version: int) -> Iterator[tuple[str, str]]:
    """Yield the names of models whose champion uses an older version of this index, with its training's folder.

    Only an index with features of the champion's base model counts.

    Raises:
        UserError: if MLflow can't be used.
    """
    for info in versions_of_index(settings, cached.table):
        behind = info.pinned("index_uri") == cached.uri and int(info.pinned("index_version")) < index_version
        if CHAMPION in info.aliases and behind and info.pinned("features_digest") == cached.features_digest:
            yield info.name, f"{settings.training_of(cached.table)}/finetuned/{info.pinned('training')}"
