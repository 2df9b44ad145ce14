"""The present champion, as an evaluation compares a candidate with it."""

from dataclasses import dataclass

from imagerag.artifacts import CachedFeatures, Finetuned
from imagerag.registry.fetch import download
from imagerag.registry.model import FOLDER
from imagerag.registry.versions import CHAMPION, list_versions, versions_of_index
from imagerag.settings import Settings

_DIGITS = 16


@dataclass(frozen=True)
class Champion:
    """A version with other weights than the candidate's."""

    version: int
    folder: str | None
    """Of its weights; None where it is for another base model, and so can't be compared."""


def present_champion(settings: Settings, finetuned: Finetuned) -> Champion | None:
    """Fetch the champion, verified, unless there is none or it has the candidate's own weights.

    Raises:
        UserError: if MLflow can't be used, or the champion's files are not what was registered.
    """
    info = next((each for each in list_versions(settings) if CHAMPION in each.aliases), None)
    if info is None or info.pinned("training") == finetuned.name:
        return None
    if info.pinned("base_digest") != finetuned.base_digest:
        return Champion(info.version, None)
    folder = settings.home / "models" / f"{info.version}-{info.pinned('content')[:_DIGITS]}"
    if not folder.exists():
        download(settings, info.version, folder)
    return Champion(info.version, str(folder / FOLDER))


def champion_behind(settings: Settings, cached: CachedFeatures, index_version: int) -> str | None:
    """Return the folder of the champion's training, if the champion uses an older version of this index.

    Only an index that has features of the champion's base model can be one for it.

    Raises:
        UserError: if MLflow can't be used.
    """
    for info in versions_of_index(settings, cached.table):
        behind = info.pinned("index_uri") == cached.uri and int(info.pinned("index_version")) < index_version
        if CHAMPION in info.aliases and behind and info.pinned("features_digest") == cached.features_digest:
            return f"{settings.training_of(cached.table)}/finetuned/{info.pinned('training')}"
    return None
