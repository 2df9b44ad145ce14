"""Networks of random weights in the exact formats of those that metrics need."""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
    ViltProcessor,
)

from imagerag.embedded import tiny_base
from tests.generation.folders import bytes_tokenizer

CLIP_DIM = 24
ANSWERS = ("yes", "no", "red", "two")


def write_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = bytes_tokenizer()
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    config = CLIPConfig(
        text_config={**layers, **ends, "vocab_size": len(tokenizer)},
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        projection_dim=CLIP_DIM,
    )
    CLIPModel(config).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size=side, crop_size=side), tokenizer).save_pretrained(folder)
    return folder


def write_head(path: Path, *widths: int) -> Path:
    """LAION's predictor is such a chain of layers."""
    weights = {}
    for number, (before, after) in enumerate(pairwise(widths)):
        layer = torch.nn.Linear(before, after)
        weights |= {f"layers.{2 * number}.weight": layer.weight.data, f"layers.{2 * number}.bias": layer.bias.data}
    save_file(weights, path)
    return path


def write_vilt(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base.FOLDER / "tokenizer")
    config = ViltConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2,
        image_size=32, patch_size=8, id2label=dict(enumerate(ANSWERS)), num_labels=len(ANSWERS),
    )  # fmt: skip
    ViltForQuestionAnswering(config).save_pretrained(folder)
    processor = ViltProcessor(ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8), tokenizer)
    processor.save_pretrained(folder)
    return folder


class _RandomInception(FeatureExtractorInceptionV3):  # type: ignore[misc]
    def load_state_dict(self, *_: object) -> None:
        """Keep the weights that it begins with."""


def write_inception(path: Path) -> Path:
    torch.save({}, path)
    network = _RandomInception("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path
