"""An encoder in open_clip's folder format, small enough to be built by every run."""

import json
from pathlib import Path

import pytest

CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def write_encoder(folder: Path, seed: int, dim: int = 16) -> Path:
    import open_clip
    import torch
    from safetensors.torch import save_model

    torch.manual_seed(seed)
    folder.mkdir()
    model = CONFIG["model_cfg"] | {"embed_dim": dim}
    save_model(open_clip.CLIP(**model), str(folder / "open_clip_model.safetensors"))
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG | {"model_cfg": model}))
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "one", seed=0)
