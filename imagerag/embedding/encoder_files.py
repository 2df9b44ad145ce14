"""Encoder specs and their resolution to local files."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from imagerag import hub
from imagerag.embedded import tiny_encoder
from imagerag.errors import UserError
from imagerag.retrieval.schema import EncoderIdentity

TINY = "tiny"
_CONFIG = "open_clip_config.json"
_WEIGHTS = "open_clip_model.safetensors"
_FILES = ("*.json", "*.txt", "*.model", _WEIGHTS)
"""Files that open_clip reads from a folder: configuration, tokenizer and weights."""
_HUB = re.compile(f"hf-hub:{hub.REPO}@{hub.REVISION}")
_PRETRAINED = re.compile(r"(?P<name>[\w.-]+)/(?P<tag>[\w.-]+)")
_FORMS = (
    "`tiny`, an open_clip name and pretrained tag (`ViT-B-32/laion2b_s34b_b79k`), a hub id and commit "
    "(`hf-hub:org/name@<40 hexadecimal digits>`) or a folder with open_clip_config.json and open_clip_model.safetensors"
)


@dataclass(frozen=True, kw_only=True)
class EncoderFiles:
    """The files of an encoder, not loaded yet."""

    identity: EncoderIdentity
    folder: Path
    text_tower: Path | None = None
    """Weights of the text tower in Hugging Face's format, if they are in a separate file."""


def check_spec(spec: str) -> str:
    """Return `spec` if it has a valid form, without reading weights or accessing the network.

    Raises:
        UserError: if the form is invalid.
    """
    if spec.startswith("hf-hub:"):
        if not _HUB.fullmatch(spec):
            raise UserError(
                "an encoder from the hub is pinned by a full commit, as in `hf-hub:org/name@<40 hexadecimal digits>`; "
                f"got {spec!r}"
            )
    elif spec != TINY and not hub.is_folder(spec, (TINY,)) and not _PRETRAINED.fullmatch(spec):
        raise UserError(f"an encoder is {_FORMS}; got {spec!r}")
    return spec


def resolve(spec: str) -> EncoderFiles:
    """Return the files of the encoder `spec`; files on the hub are downloaded unless they are cached.

    Raises:
        UserError: if the encoder does not exist, or has no safetensors weights.
    """
    check_spec(spec)
    text_tower = None
    if spec == TINY:
        folder, text_tower = tiny_encoder.FOLDER, tiny_encoder.text_folder() / "model.safetensors"
        files = [
            folder / tiny_encoder.CONFIG_NAME,
            folder / tiny_encoder.WEIGHTS_NAME,
            *_select(tiny_encoder.text_folder(), "*.safetensors"),
        ]
    else:
        folder = _folder_of(spec)
        _check_folder(folder)
        files = _select(folder)
    config = json.loads((folder / _CONFIG).read_text())
    name = str(folder) if hub.is_folder(spec, (TINY,)) else spec
    identity = EncoderIdentity(id=name, digest=_digest(files), dim=config["model_cfg"]["embed_dim"])
    return EncoderFiles(identity=identity, folder=folder, text_tower=text_tower)


def _folder_of(spec: str) -> Path:
    if match := _HUB.fullmatch(spec):
        return hub.snapshot(match["repo"], match["revision"], _FILES)
    if hub.is_folder(spec, (TINY,)):
        return hub.folder_of(spec)
    return _pretrained(*spec.split("/"))


def _pretrained(name: str, tag: str) -> Path:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags:
        raise UserError(f"open_clip has no pretrained model named {name!r}, as asked for by {name + '/' + tag!r}")
    if tag not in tags:
        raise UserError(f"open_clip's model {name!r} has no pretrained tag {tag!r}; it has {', '.join(tags)}")
    return hub.snapshot(open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rpartition("/")[0], None, _FILES)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"the encoder folder {folder} does not exist")
    if not (folder / _CONFIG).is_file():
        raise UserError(f"an encoder folder has {_CONFIG}, in open_clip's format; {folder} has none")
    if not (folder / _WEIGHTS).is_file():
        found = hub.pickle_in(folder) or "none"
        raise UserError(f"an encoder's weights are safetensors, in {_WEIGHTS}; {folder} has {found}")


def _select(folder: Path, *more_patterns: str) -> list[Path]:
    return sorted({path for pattern in (*_FILES, *more_patterns) for path in folder.glob(pattern)})


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
