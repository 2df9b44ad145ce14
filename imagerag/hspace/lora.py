"""LoRA on the UNet decoder, trained and used together with an adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from imagerag.errors import UserError

LORA_NAME = "imagerag"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def load_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Attach the LoRA weights in `folder`, written by a fine-tuning, to `unet`."""
    unet.load_lora_adapter(
        folder,
        weight_name=WEIGHTS_NAME,
        prefix=None,
        adapter_name=LORA_NAME,
        use_safetensors=True,
        local_files_only=True,
    )
    unet.requires_grad_(False)


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the LoRA weights of `unet` in diffusers' format, for `load_lora`."""
    unet.save_lora_adapter(folder, adapter_name=LORA_NAME, weight_name=WEIGHTS_NAME)


def copy_without_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a copy of the UNet without its LoRA; the copy shares its weights with `unet`.

    Raises:
        UserError: if the LoRA is fused into the weights.
    """
    _unfused_layers(unet)
    weights = {name.replace(".base_layer.", "."): weight for name, weight in unet.state_dict().items()}
    with torch.device("meta"):
        copy: UNet2DConditionModel = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict({name: weight for name, weight in weights.items() if ".lora_" not in name}, assign=True)
    return copy


@contextmanager
def without_lora(unet: UNet2DConditionModel) -> Iterator[None]:
    """Disable a fine-tuning's LoRA within the context; other adapters stay active.

    Raises:
        UserError: if the LoRA is fused into the weights.
    """
    layers = _unfused_layers(unet) if LORA_NAME in getattr(unet, "peft_config", {}) else []
    active = [list(layer.active_adapters) for layer in layers]
    for layer, names in zip(layers, active, strict=True):
        layer.set_adapter([name for name in names if name != LORA_NAME])
    try:
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.set_adapter(names)
        if layers:
            unet.requires_grad_(False)


def _unfused_layers(unet: UNet2DConditionModel) -> list[Any]:
    """Return the layers with LoRA of any origin, of which the fine-tuning's is not fused into the weights.

    Fused weights are not unfused here: subtracting what was added rounds, and would change them a little in each call.

    Raises:
        UserError: if it is fused.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]
    if any(LORA_NAME in layer.merged_adapters for layer in layers):
        raise UserError(
            "the adapter's LoRA is fused into the UNet's weights, and the base model is needed without it: call "
            "unfuse_lora() first"
        )
    return layers
