"""Check that registered versions are usable: their files, and the index that they pin."""

from collections.abc import Iterator

from imagerag.registry.removal import files_of
from imagerag.registry.versions import VersionInfo, every_version, reading_registry
from imagerag.retrieval.store import Store
from imagerag.settings import Settings


def check_versions(settings: Settings) -> Iterator[tuple[VersionInfo, str | None]]:
    """Yield every version of all registered models, newest first, with a description of its fault or None.

    Raises:
        UserError: if MLflow can't be used.
    """
    with reading_registry(settings) as client:
        infos = every_version(client)
    for info in infos:
        yield info, _fault(settings, info)


def _fault(settings: Settings, info: VersionInfo) -> str | None:
    with reading_registry(settings) as client:
        source = client.get_model_version_download_uri(info.name, str(info.version))
    try:
        found = any(path.endswith("MLmodel") for path, _ in files_of(settings, source))
    except Exception as error:  # noqa: BLE001 - artifact stores raise their own exceptions
        return f"its files in {source} can't be read: {error}"
    if not found:
        return f"its files are not in {source}"
    if info.portable:
        return None
    name, version = info.pinned("index_name"), int(info.pinned("index_version"))
    if any(Store(uri, name).has(version) for uri in {info.pinned("index_uri"), settings.index_uri}):
        return None
    return f"version {version} of its index {name!r} is gone"
