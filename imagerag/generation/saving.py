"""What a pipeline's folder has beside a base model's parts, and where its weights are in memory."""

from pathlib import Path
from typing import Any

import torch

from imagerag.errors import UserError
from imagerag.generation.finetuned import LORA
from imagerag.hspace.lora import LORA_NAME, WEIGHTS_NAME, copy_without_lora, load_lora, save_lora
from imagerag.locks import local_folder

_CODE = "pipeline.py"
"""What diffusers calls the file of a pipeline's own class, see `DiffusionPipeline.from_pretrained`."""
_ALIGNMENT = 64
"""Of torch's own tensors on a CPU, in bytes."""


def save_beside(pipeline: Any, folder: Path) -> Any:
    """Write the pipeline's LoRA, if it has some, and return a pipeline without it, which shares all weights.

    Beside them is a file by which diffusers' own `DiffusionPipeline` finds the class, for those who let it run code.

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
    kind = type(pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    # Always under the same name: diffusers runs it in one module, whatever folder it lies in.
    code = f"from {kind.__module__} import {kind.__name__} as Pipeline  # noqa: F401\n"
    (folder / _CODE).write_text(code, encoding="utf-8")
    return savable


def attach_beside(pipeline: Any, folder: Path) -> None:
    """Attach the LoRA that belongs to a pipeline of a folder, if it isn't yet, and find the index that lies there.

    Raises:
        UserError: if LoRA belongs to it and is not there.
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
        pipeline.register_to_config(index_uri=str(folder.absolute() / index))  # an absolute one stays as it is


def unify(pipeline: Any) -> None:
    """Cast the pipeline to the dtype that it was saved in, where diffusers was told none and mixed two.

    It then loads its own models in float32, and those of transformers as they were saved.
    """
    encoder, saved = pipeline.text_encoder, pipeline.config.weight_dtype
    if None in (encoder, saved) or encoder.dtype == pipeline.unet.dtype:
        return
    if (pipeline.unet.dtype, encoder.dtype) == (torch.float32, getattr(torch, saved)):
        pipeline.to(encoder.dtype)


def align(pipeline: Any) -> None:
    """Have all weights where torch puts its own tensors.

    Files are mapped into memory as they are, and the last digits of a product depend on where its factors are. So a
    picture is the same bit for bit, whatever file its pipeline was loaded from.
    """
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    for tensor in (each for module in modules for each in (*module.parameters(), *module.buffers())):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
