"""Files that metrics are given: read as tensors alone, and known by what they hold."""

from pathlib import Path
from typing import TYPE_CHECKING

from imagerag.digests import digest_of
from imagerag.errors import UserError
from imagerag.evaluation.config import MetricFiles

if TYPE_CHECKING:
    import torch


def digests_of(files: MetricFiles) -> dict[str, str]:
    """Return a digest of each given file or folder, by its field.

    Raises:
        UserError: if one is not there.
    """
    return {f"files.{field}": _digest(field, place) for field, place in files.model_dump(exclude_none=True).items()}


def _digest(field: str, place: str) -> str:
    path = Path(place).expanduser()
    if not path.exists():
        raise UserError(f"files.{field} has to be a file or folder on this machine; there is no {place}")
    paths = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return digest_of({each.relative_to(path).as_posix(): each for each in paths})


def transformers_folder(field: str, folder: str) -> Path:
    """Return the path of a model's folder.

    Raises:
        UserError: if it holds no model of transformers' in safetensors.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise UserError(f"files.{field} has to be a transformers folder with safetensors; {folder} is not")
    return path


def load_tensors(path: str) -> dict[str, "torch.Tensor"]:
    """Read a file of tensors, and refuse everything else.

    Raises:
        UserError: if the file holds anything else or can't be read.
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
        raise UserError(f"{path} has to hold tensors by their names; it holds a {type(loaded).__name__}")
    return {name: each for name, each in loaded.items() if isinstance(each, torch.Tensor)}
