"""Download and verify a version's files from MLflow, unchanged or converted to a diffusers folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from imagerag.errors import UserError
from imagerag.registry import package
from imagerag.registry.card import CARD, GRID
from imagerag.registry.model import FOLDER, check_model
from imagerag.registry.versions import (
    CODE_TAG,
    VersionInfo,
    check_signed,
    find_version,
    reading_registry,
    resolve_version,
)
from imagerag.settings import Settings
from imagerag.training.tracking import tracking_uri

_TRACES = ("registered_model_meta", "__pycache__")
"""What MLflow and Python write next to a version's files if a process loads it in place, from a folder."""

if TYPE_CHECKING:
    from imagerag.generation.pipeline import ImageRAGTurboPipeline


def download(settings: Settings, version: int, to: Path) -> Path:
    """Download a version's files, verify that they are as registered, and return the model's own folder.

    No file is run or unpickled. `to` is written completely or not at all.

    Raises:
        UserError: if MLflow or the version is unavailable, the version was not registered by this package, has a pickle
            or was changed, or `to` exists.
    """
    from mlflow.artifacts import download_artifacts

    _check_free(to)
    name = settings.model_name
    with reading_registry(settings) as client:
        info = find_version(client, name, str(version))
        digest = check_signed(info)
        source = client.get_model_version_download_uri(name, str(version))
    with _partial(to) as partial:
        try:
            fetched = download_artifacts(source, dst_path=str(partial), tracking_uri=tracking_uri(settings))
        except Exception as error:
            raise UserError(f"the files of {name} {version} can't be fetched from {source}: {error}") from error
        for trace in chain.from_iterable(Path(fetched).rglob(name) for name in _TRACES):
            shutil.rmtree(trace) if trace.is_dir() else trace.unlink()
        check_model(Path(fetched), digest, info.tags.get(CODE_TAG))
        Path(fetched).rename(to)
    return to / FOLDER


def pull_served(settings: Settings, alias_or_version: str, out: Path) -> VersionInfo:
    """Write a version as `mlflow models serve` and `load_model` read it, after verifying the code that they run.

    Raises:
        UserError: as `download`, and if the version has no digest to verify its code with.
    """
    info = resolve_version(settings, alias_or_version)
    if CODE_TAG not in info.tags:
        raise UserError(
            f"version {info.version} of {info.name} has no tag {CODE_TAG}: it was registered by an earlier release, "
            "and nothing tells whether MLflow would run what was registered. Register it again"
        )
    download(settings, info.version, out)
    return info


@contextmanager
def opened(settings: Settings, alias_or_version: str) -> "Iterator[ImageRAGTurboPipeline]":
    """Yield a version's pipeline with its base model, adapter and index; its files are deleted after the block.

    Raises:
        UserError: as `pull`.
    """
    info = resolve_version(settings, alias_or_version)
    with TemporaryDirectory() as temporary:
        yield package.load(download(settings, info.version, Path(temporary, "model")))


def pull(settings: Settings, alias_or_version: str, out: Path) -> VersionInfo:
    """Write a version as `ImageRAGTurboPipeline.from_pretrained` loads it: base model, adapter, LoRA, card.

    The folder of a portable version has a copy of its index; others have the index's URI and version.

    Raises:
        UserError: as `download`, and if the base model or the index is not the pinned one.
    """
    _check_free(out)
    info = resolve_version(settings, alias_or_version)
    with _partial(out) as partial:
        folder = download(settings, info.version, partial / "model")
        pipeline = package.load(folder, device="cpu")
        pulled = partial / "pulled"
        if info.portable:
            pipeline.register_to_config(index_uri=package.INDEX)
        pipeline.save_pretrained(pulled)
        for path in (folder / package.MANIFEST, partial / "model" / CARD, partial / "model" / GRID):
            if path.is_file():
                shutil.copy(path, pulled)
        if info.portable:
            shutil.copytree(folder / package.INDEX, pulled / package.INDEX)
        pulled.rename(out)
    return info


def _check_free(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} is there already, and nothing is overwritten: name a folder that is not there")


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, whose complete contents can then be moved to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", suffix=".partial", dir=path.parent) as folder:
        yield Path(folder)
