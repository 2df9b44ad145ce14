"""Model files from the Hugging Face hub or a folder: names pinned by commit, downloads, and no pickles."""

from collections.abc import Collection
from pathlib import Path

from imagerag.errors import UserError

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[0-9a-f]{40})"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def is_folder(spec: str, names: Collection[str]) -> bool:
    """Return whether a model's spec is a folder and none of the reserved `names`, which a folder may have too."""
    return spec.startswith(("/", ".", "~")) or (spec not in ("", *names) and Path(spec).is_dir())


def folder_of(spec: str) -> Path:
    """Return the absolute path of a folder, because workers may have another working directory."""
    return Path(spec).expanduser().absolute()


def snapshot(repo: str, revision: str | None, allow: Collection[str], ignore: Collection[str] = ()) -> Path:
    """Return the local folder of a repository's files; those that are not cached are downloaded.

    Args:
        repo: `org/name`.
        revision: full commit, or None for a repository that is named by a pinned package.
        allow: patterns of the files to download.
        ignore: patterns of files among them to leave out.

    Raises:
        UserError: if the files are neither cached nor can be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(allow), ignore_patterns=list(ignore))
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        name = repo if revision is None else f"{repo}@{revision}"
        raise UserError(
            f"the model {name} is not on this machine and could not be downloaded ({type(error).__name__}). Give a "
            "folder that contains it, or use a machine that reaches the hub"
        ) from error


def pickle_in(folder: Path) -> str | None:
    """Return the first of a folder's pickled weight files with the reason why it is not loaded, or None."""
    pickled = sorted(path for path in folder.iterdir() if path.suffix in _PICKLED)
    return f"{pickled[0]}, a pickle, which can run code when it is loaded" if pickled else None
