"""`imagerag doctor`: check the installation, servers, models and indexes, and suggest fixes."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from imagerag import _torchvision
from imagerag.errors import UserError

if TYPE_CHECKING:
    from imagerag.processes import Service

PACKAGES = (
    "prefect",
    "ray",
    "torch",
    "torchvision",
    "diffusers",
    "peft",
    "img2dataset",
    "lancedb",
    "pylance",
    "open_clip_torch",
    "mlflow",
)
_MISFIT = ", built for CUDA, with a CPU build of torch: import imagerag before torchvision and diffusers"
_OWN_PREFECT = "embedded: started for each run (`make up` starts a permanent one, with the UI)"
_OWN_MLFLOW = "embedded: a database under the home (`make up` starts a server with the UI)"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says how to fix a problem."""

    what: str
    seen: str
    remedy: str = ""


def doctor() -> None:
    """Check what is installed, which servers answer, which models and indexes exist, and say how to fix problems."""
    from rich.table import Table

    from imagerag.cli.terminal import PlainConsole

    sections: dict[str, Callable[[], Iterator[Finding]]] = {
        "installed": _packages,
        "engines": _engines,
        "object stores": _object_stores,
        "encoders and base models": _models,
        "indexes": _indexes,
        "registered models": _registered,
    }
    missing = 0
    console = PlainConsole()
    for title, findings in sections.items():
        table = Table(title=title, title_justify="left", show_header=False)
        for finding in findings():
            missing += bool(finding.remedy)
            table.add_row(finding.what, finding.seen, f"→ {finding.remedy}" if finding.remedy else "")
        console.print(table)
    console.print(f"{missing} problem(s), marked →." if missing else "No problems found.")
    if missing:
        raise typer.Exit(1)


def _object_stores() -> Iterator[Finding]:
    from imagerag.settings import Settings
    from imagerag.storage.files import keeps_writers_apart
    from imagerag.storage.locks import local_folder

    settings = Settings()
    uris = [uri for uri in (settings.shards_uri, settings.index_uri, settings.training_uri) if not local_folder(uri)]
    if not uris:
        yield Finding("object stores", "none: all data is in local folders")
    for uri in uris:
        try:
            apart = keeps_writers_apart(uri)
        except Exception as error:  # noqa: BLE001 - stores raise their own exceptions
            yield Finding(uri, f"can't be written: {error}", "check AWS_ENDPOINT_URL and the credentials")
            continue
        remedy = "" if apart else "use a store with If-None-Match and If-Match: concurrent jobs may lose rows"
        yield Finding(uri, "supports conditional writes" if apart else "does not support conditional writes", remedy)


def _packages() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
    for package in PACKAGES:
        try:
            misfit = package == "torchvision" and _torchvision.is_misfit()
            yield Finding(package, importlib.metadata.version(package) + (_MISFIT if misfit else ""))
        except importlib.metadata.PackageNotFoundError:
            remedy = "pip install 'imagerag-turbo[pipeline]'; in a checkout, make clean, then any other make target"
            yield Finding(package, "missing", remedy)
    try:
        importlib.metadata.version("dataclasses")
        remedy = "pip uninstall dataclasses (it shadows the standard library's in Prefect's temporary server)"
        yield Finding("dataclasses", "a package from PyPI", remedy)
    except importlib.metadata.PackageNotFoundError:
        pass


def _engines() -> Iterator[Finding]:
    from imagerag.processes import find
    from imagerag.services import MLFLOW, PREFECT
    from imagerag.settings import Settings

    settings = Settings()
    yield Finding("home", str(settings.home))
    prefect, mlflow = settings.prefect_api_url, settings.mlflow_tracking_uri
    home = settings.home
    yield _server("Prefect", prefect, "IMAGERAG_PREFECT_API_URL", find(home, PREFECT), _OWN_PREFECT)
    yield _server("MLflow", mlflow, "IMAGERAG_MLFLOW_TRACKING_URI", find(home, MLFLOW), _OWN_MLFLOW)
    yield Finding("Ray", settings.ray_address or "embedded: started on this machine for each run")
    yield Finding("GPU", _gpu())


def _server(what: str, given: str | None, variable: str, started: "Service | None", embedded: str) -> Finding:
    """Report which server is used: the configured one, the one that `make up` started, or an embedded one."""
    from imagerag.processes import answers

    if given is not None:
        if answers(f"{given}/health"):
            return Finding(what, f"{given} answers")
        return Finding(what, f"{given} does not answer", f"start that server, or unset {variable}")
    return Finding(what, embedded if started is None else f"server at {started.url}, process {started.pid}")


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none; everything runs on the CPU"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _models() -> Iterator[Finding]:
    from imagerag.base import files as bases
    from imagerag.embedding import encoder_files as encoders

    try:
        identity = encoders.resolve("tiny").identity
        yield Finding("encoder tiny", f"{identity.dim} dimensions, digest {identity.digest[:12]}")
    except UserError as error:
        yield Finding("encoder tiny", "not usable", str(error))
    for name in (bases.TINY, bases.TINY_TEACHER):
        try:
            yield Finding(f"base model {name}", f"digest {bases.resolve(name).identity.digest[:12]}")
        except UserError as error:
            yield Finding(f"base model {name}", "not usable", str(error))
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = sorted(repository.repo_id for repository in scan_cache_dir().repos if repository.repo_type == "model")
    except CacheNotFound:
        cached = []
    yield Finding("models in the hub's cache", ", ".join(cached) or "none")


def _indexes() -> Iterator[Finding]:
    from imagerag.retrieval.publish import status
    from imagerag.retrieval.store import list_stores
    from imagerag.settings import Settings

    stores = list_stores(Settings().index_uri)
    if not stores:
        yield Finding("index", "none yet", "imagerag ingest LIST, or `make demo` for the sample corpus")
    for store in stores:
        try:
            state = status(store)
        except UserError as error:
            yield Finding(store.name, "can't be read", str(error))
            continue
        if state.published_version is None:
            yield Finding(
                store.name, f"{state.num_rows:,} rows, not published", f"imagerag index status --name {store.name}"
            )
        else:
            yield Finding(store.name, f"version {state.published_version}, {state.num_rows:,} rows, {state.encoder.id}")


def _registered() -> Iterator[Finding]:
    from imagerag.registry.health import check_versions
    from imagerag.registry.versions import has_registry
    from imagerag.settings import Settings

    settings = Settings()
    if not has_registry(settings):
        yield Finding("models", "none yet")
        return
    try:
        for info, fault in check_versions(settings):
            seen = ", ".join([*info.aliases, f"index {info.pinned('index_name')} {info.pinned('index_version')}"])
            remove = f"imagerag models remove {info.version} --model-name {info.name}"
            remedy = f"{fault}: register it again (`imagerag evaluate`), or `{remove}`"
            yield Finding(f"{info.name} {info.version}", seen, remedy if fault else "")
    except UserError as error:
        yield Finding("models", "not known", str(error))
