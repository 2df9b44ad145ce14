"""What a pipeline's folder has beside a base model's parts, and where its weights are in memory."""

from pathlib import Path
from typing import Any

import torch

from imagerag.errors import UserError
from imagerag.generation.finetuned import LORA
from imagerag.hspace.lora import LORA_NAME, WEIGHTS_NAME, copy_without_lora, load_lora, save_lora
from imagerag.locks import local_folder

_ALIGNMENT = 64
"""Of torch's own tensors on a CPU, in bytes."""


def save_beside(pipeline: Any, folder: Path) -> Any:
    """Write the pipeline's LoRA, if it has some, and return a pipeline without it, which shares all weights.

    Raises:
        UserError: if LoRA is attached that was not trained with an adapter.
    """
    names = set(getattr(pipeline.unet, "peft_config", {}))
    if others := names - {LORA_NAME}:
        raise UserError(
            f"a pipeline is saved with the LoRA that was trained with its adapter, and no other; {min(others)!r} is "
            "attached: take it off by unet.delete_adapters"
        )
    savable = pipeline
    if names:
        save_lora(pipeline.unet, folder / LORA)
        config = {name: pipeline.config[name] for name in pipeline._get_signature_keys(pipeline)[1]}
        savable = type(pipeline)(**pipeline.components | {"unet": copy_without_lora(pipeline.unet)}, **config)
    savable.register_to_config(has_lora=bool(names))
    return savable


def attach_beside(pipeline: Any, folder: Path) -> None:
    """Attach the LoRA that belongs to a loaded pipeline, and find the index that lies in its folder.

    Raises:
        UserError: if LoRA belongs to it and is not there.
    """
    if pipeline.config.has_lora:
        if not (folder / LORA / WEIGHTS_NAME).is_file():
            raise UserError(
                f"LoRA belongs to the pipeline in {folder}, and is read from a folder on this machine; "
                f"{folder / LORA / WEIGHTS_NAME} does not exist"
            )
        load_lora(pipeline.unet, folder / LORA)
    uri = pipeline.config.index_uri
    if uri is not None and (index := local_folder(uri)) is not None:
        pipeline.register_to_config(index_uri=str(folder.absolute() / index))  # an absolute one stays as it is


def align(pipeline: Any) -> None:
    """Have all weights where torch puts its own tensors.

    Files are mapped into memory as they are, and the last digits of a product depend on where its factors are. So a
    picture is the same bit for bit, whatever file its pipeline was loaded from.
    """
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    for tensor in (each for module in modules for each in (*module.parameters(), *module.buffers())):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
