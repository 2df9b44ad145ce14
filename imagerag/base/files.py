"""Names of base models, and their resolution to local files."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagerag import hub
from imagerag.embedded import tiny_base
from imagerag.embedded.tiny_encoder import text_folder
from imagerag.errors import UserError
from imagerag.storage.digests import digest_of

TINY = "tiny"
TINY_TEACHER = "tiny-teacher"
_EMBEDDED = (TINY, TINY_TEACHER)
PAPERS_W = 0.8
"""Slerp weight of base models that don't define one (paper, Sec. 3.2)."""
_HUB = re.compile(f"{hub.REPO}(@{hub.REVISION})?")
_INDEX = "model_index.json"
_REQUIRED = ("vae", "unet", "scheduler", "tokenizer", "text_encoder")
_OPTIONAL = ("tokenizer_2", "text_encoder_2")
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
_FORMS = (
    "`tiny`, `tiny-teacher`, a hub id and commit (`stabilityai/sd-turbo@<40 hexadecimal digits>`) or a folder in "
    "diffusers' format"
)


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """Identity of a base model."""

    id: str
    """`tiny`, a hub id and commit, or a folder."""
    digest: str
    """Digest of all weights and configurations."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a base model: `unet`, `vae` and so on."""

    folder: Path
    """Folder of its configuration."""
    weights_folder: Path
    variant: str | None
    """Variant of its weights: `fp16` if only these exist, otherwise None."""
    files: tuple[Path, ...]
    """All files that it is loaded from."""


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """The files of a base model, before it is loaded."""

    identity: BaseIdentity
    parts: dict[str, Part]
    slerp_w: float
    """Default slerp weight of the base model."""


def check_spec(spec: str) -> str:
    """Return `spec` if it has the form of a base model's name, without access to weights or the network.

    Raises:
        UserError: if it has another form.
    """
    if spec in _EMBEDDED or hub.is_folder(spec, _EMBEDDED):
        return spec
    match = _HUB.fullmatch(spec)
    if match is None:
        raise UserError(f"a base model is {_FORMS}; got {spec!r}")
    if match["revision"] is None:
        raise UserError(
            f"a base model from the hub is pinned by a full commit, as in `{spec}@<40 hexadecimal digits>`, because it "
            f"could change otherwise; got {spec!r}. Its commits are on its page, under Files and versions"
        )
    return spec


def resolve(spec: str) -> BaseFiles:
    """Return the files of the base model `spec`; those on the hub are downloaded unless they are cached.

    Raises:
        UserError: if there is no such model, a part of it is missing, or its weights are pickles.
    """
    parts = parts_of(spec)
    files = {f"{name}/{file.name}": file for name, part in parts.items() for file in part.files}
    name = str(hub.folder_of(spec)) if hub.is_folder(spec, _EMBEDDED) else spec
    return BaseFiles(
        identity=BaseIdentity(id=name, digest=digest_of(files)), parts=parts, slerp_w=_slerp_w(spec, parts)
    )


def identity_of_folder(folder: str | None) -> BaseIdentity:
    """Return the identity of a base model that was loaded from a folder.

    Raises:
        UserError: if it was not loaded from a folder.
    """
    if folder is None or not Path(folder).is_dir():
        raise UserError(
            "an index has features of a base model's digest, and that of a pipeline which was made from its parts is "
            "not known: load it from a folder or the hub, or give it its base_digest"
        )
    return resolve(str(Path(folder).absolute())).identity


def parts_of(spec: str, only: Collection[str] = ()) -> dict[str, Part]:
    """Return the parts of the base model `spec` by name, all or `only` these, without computing a digest."""
    check_spec(spec)
    weights_folders: dict[str, Path] = {}
    if spec in _EMBEDDED:
        folders = _tiny_folders("unet" if spec == TINY else "teacher", only)
        weights_folders["text_encoder"] = text_folder()
    else:
        folders = _folders_of(hub.folder_of(spec) if hub.is_folder(spec, _EMBEDDED) else _snapshot_of(spec))
    return {
        name: _check_part(name, folder, weights_folders.get(name, folder))
        for name, folder in folders.items()
        if not only or name in only
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON configuration file of a base model.

    Raises:
        UserError: if it is not JSON.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} has to be JSON: {error}") from error
    return content


def _slerp_w(spec: str, parts: Mapping[str, Part]) -> float:
    """Return a base model's default slerp weight: `slerp_w` of its model_index.json, otherwise the paper's."""
    if spec == TINY:
        return tiny_base.SLERP_W
    index = parts["unet"].folder.parent / _INDEX
    w = read_json(index).get("slerp_w", PAPERS_W) if index.is_file() else PAPERS_W
    if not isinstance(w, int | float) or not -1 <= w <= 1:
        raise UserError(f"slerp_w, the weight of the base model in slerp, is between -1 and 1; {index} says {w!r}")
    return w


def _tiny_folders(unet: str, only: Collection[str]) -> dict[str, Path]:
    # The training of `tiny` needs its text encoder before there are UNet weights.
    if not only and not (tiny_base.FOLDER / unet).is_dir():
        raise UserError(
            f"the weights of `tiny` are missing: {tiny_base.FOLDER / unet} is not there. Install the package again, "
            "train them by `python -m imagerag.recipes.tiny_base.train` (hours on two cores), or name another model"
        )
    return {part: tiny_base.FOLDER / part for part in _REQUIRED} | {"unet": tiny_base.FOLDER / unet}


def _snapshot_of(spec: str) -> Path:
    match = _HUB.fullmatch(spec)
    assert match is not None, "checked before"
    # Without other variants, and without the single-file checkpoint next to the folders.
    patterns = [
        f"{part}/*{ending}" for part in (*_REQUIRED, *_OPTIONAL) for ending in (".json", ".txt", ".safetensors")
    ]
    return hub.snapshot(match["repo"], match["revision"], [_INDEX, *patterns], ["*.fp16.safetensors", "*.non_ema.*"])


def _folders_of(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"the base model's folder {folder} does not exist")
    if not (folder / _INDEX).is_file():
        raise UserError(f"a base model's folder has {_INDEX}, in diffusers' format; {folder} has none")
    listed = read_json(folder / _INDEX)
    parts = {}
    for part in (*_REQUIRED, *_OPTIONAL):
        present = isinstance(listed.get(part), list) and listed[part][0] is not None
        if present and not (folder / part).is_dir():
            raise UserError(f"{folder / _INDEX} lists {part}, but there is no folder {folder / part}")
        if not present and part in _REQUIRED:
            raise UserError(f"a base model has {', '.join(_REQUIRED)}; {folder / _INDEX} lists no {part}")
        if present:
            parts[part] = folder / part
    return parts


def _check_part(name: str, folder: Path, weights_folder: Path) -> Part:
    def part(*files: Path, variant: str | None = None) -> Part:
        return Part(folder=folder, weights_folder=weights_folder, variant=variant, files=files)

    if name.startswith("tokenizer"):
        return part(*sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}))
    config = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
    if not config.is_file():
        raise UserError(f"the base model's {name} has no {config}")
    if name == "scheduler":
        return part(config)
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    for variant in (None, "fp16"):
        weights = weights_folder / ".".join(filter(None, (stem, variant, "safetensors")))
        if weights.is_file():
            return part(config, weights, variant=variant)
    index = weights_folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return part(config, index, *_shards(index))
    raise UserError(_no_weights(name, weights_folder, f"{stem}.safetensors"))


def _shards(index: Path) -> list[Path]:
    names = sorted(set(read_json(index)["weight_map"].values()))
    shards = [index.parent / Path(name).name for name in names]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{index} lists {missing[0]}, which is not in {index.parent}")
    return shards


def _no_weights(part: str, folder: Path, expected: str) -> str:
    if (pickled := hub.pickle_in(folder)) is not None:
        return (
            f"the {part}'s weights are {pickled}. Save the model again with safetensors, as `save_pretrained` does, so "
            f"that there is {expected}"
        )
    return f"the {part} has no weights: {folder / expected} does not exist"
