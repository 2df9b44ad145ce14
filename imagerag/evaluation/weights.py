"""Weights files of metrics: safe loading (tensors only) and content digests."""

from pathlib import Path
from typing import TYPE_CHECKING

from imagerag.errors import UserError
from imagerag.evaluation.config import MetricFiles
from imagerag.storage.digests import digest_of

if TYPE_CHECKING:
    import torch


def digests_of(files: MetricFiles) -> dict[str, str]:
    """Return the digest of each given file or folder by its field.

    Raises:
        UserError: if one does not exist.
    """
    return {f"files.{field}": _digest(field, place) for field, place in files.model_dump(exclude_none=True).items()}


def _digest(field: str, place: str) -> str:
    path = Path(place).expanduser()
    if not path.exists():
        raise UserError(f"files.{field} must be a file or folder on this machine; {place} does not exist")
    paths = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return digest_of({each.relative_to(path).as_posix(): each for each in paths})


def transformers_folder(field: str, folder: str) -> Path:
    """Return the path of a transformers folder.

    Args:
        field: the field of `MetricFiles`, for the error.
        folder: the folder as the user gave it.

    Raises:
        UserError: if the folder has no config.json or no safetensors.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise UserError(f"files.{field} must be a transformers folder with safetensors; {folder} is not")
    return path


def load_tensors(path: str) -> dict[str, "torch.Tensor"]:
    """Load a safetensors or PyTorch file, with tensors only.

    Raises:
        UserError: if the file can't be read or holds other objects.
    """
    from pickle import UnpicklingError

    import torch
    from safetensors.torch import load_file

    file = Path(path).expanduser()
    try:
        loaded = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, ValueError) as error:
        raise UserError(f"{path} can't be read as a file of tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold tensors by name; it holds a {type(loaded).__name__}")
    return {name: each for name, each in loaded.items() if isinstance(each, torch.Tensor)}
