"""The present champion, as an evaluation compares a candidate with it."""

from dataclasses import dataclass

from imagerag.artifacts import Finetuned
from imagerag.registry.model import FOLDER
from imagerag.registry.versions import CHAMPION, download, list_versions
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
