"""Saving and loading of a pipeline's LoRA and index, and the dtype and memory alignment of its weights."""

from pathlib import Path
from typing import Any

import torch

from imagerag.errors import UserError
from imagerag.generation.finetuned import LORA
from imagerag.hspace.lora import LORA_NAME, WEIGHTS_NAME, copy_without_lora, load_lora, save_lora
from imagerag.storage.locks import local_folder

_CODE = "pipeline.py"
"""Name that diffusers expects for the file of a custom pipeline class, see `DiffusionPipeline.from_pretrained`."""
_ALIGNMENT = 64
"""Alignment in bytes of tensors that torch allocates on a CPU."""


def save_beside(pipeline: Any, folder: Path) -> Any:
    """Write the pipeline's LoRA, if there is one, and return a pipeline without it that shares all other weights.

    Also writes a file from which `DiffusionPipeline` loads the pipeline's class, if the user allows custom code.

    Raises:
        UserError: if another LoRA than the adapter's is attached.
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
    kind = type(pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    # Always the same class name: diffusers runs this file in one module for all folders.
    code = f"from {kind.__module__} import {kind.__name__} as Pipeline  # noqa: F401\n"
    (folder / _CODE).write_text(code, encoding="utf-8")
    return savable


def attach_beside(pipeline: Any, folder: Path) -> None:
    """Attach the LoRA in a pipeline's folder, unless it is attached, and resolve the index's path in the folder.

    Raises:
        UserError: if the pipeline's LoRA is missing.
    """
    if pipeline.config.has_lora and LORA_NAME not in getattr(pipeline.unet, "peft_config", {}):
        if not (folder / LORA / WEIGHTS_NAME).is_file():
            raise UserError(
                f"LoRA belongs to the pipeline in {folder}, and is read from a folder on this machine; "
                f"{folder / LORA / WEIGHTS_NAME} does not exist"
            )
        load_lora(pipeline.unet, folder / LORA)
    uri = pipeline.config.index_uri
    if uri is not None and (index := local_folder(uri)) is not None:
        pipeline.register_to_config(index_uri=str(folder.absolute() / index))  # absolute paths stay unchanged


def unify(pipeline: Any) -> None:
    """Cast a pipeline that diffusers loaded in two dtypes to the dtype that it was saved in.

    Without a `dtype` argument, diffusers loads its own models in float32, and transformers' in their saved dtype.
    """
    encoder, saved = pipeline.text_encoder, pipeline.config.weight_dtype
    if None in (encoder, saved) or encoder.dtype == pipeline.unet.dtype:
        return
    if (pipeline.unet.dtype, encoder.dtype) == (torch.float32, getattr(torch, saved)):
        pipeline.to(encoder.dtype)


def align(pipeline: Any) -> None:
    """Align all CPU weights in memory like tensors that torch allocates.

    Weights in memory-mapped files have any alignment, and the last digits of a matrix product depend on it. Aligned
    weights make pictures bit-for-bit independent of the file that the pipeline was loaded from.
    """
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    for tensor in (each for module in modules for each in (*module.parameters(), *module.buffers())):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
