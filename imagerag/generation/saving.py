"""Saving and loading of a pipeline with its LoRA and index, and the dtype and memory alignment of its weights."""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from imagerag.base.model import BaseModel
from imagerag.errors import UserError
from imagerag.generation.finetuned import LORA
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.hspace.lora import LORA_NAME, WEIGHTS_NAME, copy_without_lora, load_lora, save_lora
from imagerag.storage.locks import local_folder

_CODE = "pipeline.py"
"""Name that diffusers expects for the file of a custom pipeline class, see `DiffusionPipeline.from_pretrained`."""
_ALIGNMENT = 64
"""Alignment in bytes of tensors that torch allocates on a CPU."""


class SavingMixin:
    """Mixed into a diffusers pipeline: creates it from a base model, and saves and loads what diffusers does not."""

    config: Any
    unet: UNet2DConditionModel

    @classmethod
    def _kind(cls, *, two_text_encoders: bool) -> Any:
        """Return the pipeline class for base models with one or two text encoders."""
        return cls

    @classmethod
    def from_base(cls, base: BaseModel, adapter: HSpaceAdapter | None = None) -> Self:
        """Return a pipeline of a loaded base model, with an optional adapter."""
        kind: Any = cls._kind(two_text_encoders=len(base.text_encoders) > 1)
        parts: dict[str, Any] = {}
        for name, tokenizer, encoder in zip(("", "_2"), base.tokenizers, base.text_encoders, strict=False):
            parts |= {f"tokenizer{name}": tokenizer, f"text_encoder{name}": encoder}
        pipeline: Self = kind(
            vae=base.vae,
            unet=base.unet,
            scheduler=base.scheduler,
            adapter=adapter,
            base_id=base.identity.id,
            base_digest=base.identity.digest,
            slerp_w=base.slerp_w,
            **parts,
        )
        align(pipeline)
        return pipeline

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Self:
        """Load a pipeline that `save_pretrained` or `imagerag pull` wrote, or any base model in diffusers' format.

        Raises:
            UserError: if the pipeline's LoRA is missing.
        """
        name = str(pretrained_model_name_or_path)
        listed = DiffusionPipeline.load_config(name, **arguments)
        if not arguments.keys() & {"dtype", "torch_dtype"}:
            # Without a dtype, diffusers loads its own models in float32, and others in their saved dtype.
            arguments["dtype"] = getattr(torch, listed.get("weight_dtype") or "float32")
        kind: Any = cls._kind(two_text_encoders="text_encoder_2" in listed)
        folder = Path(name) if Path(name).is_dir() else Path(kind.download(name, **arguments))
        pipeline: Self = super(SavingMixin, kind).from_pretrained(str(folder), **arguments)  # type: ignore[misc]
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **arguments: Any) -> Self:
        """Create a pipeline from another's components, as diffusers does; LoRA stays attached to the UNet."""
        has_lora = LORA_NAME in getattr(getattr(pipeline, "unet", None), "peft_config", {})
        made: Self = super().from_pipe(pipeline, **{"has_lora": has_lora} | arguments)  # type: ignore[misc]
        return made

    def register_to_config(self, **config: Any) -> None:
        """Update the configuration; when diffusers sets `_name_or_path`, its last step of loading, also attach LoRA.

        LoRA and the index in the pipeline's folder are thus found even if `DiffusionPipeline` loads it.

        Raises:
            UserError: if the pipeline's LoRA is missing.
        """
        super().register_to_config(**config)  # type: ignore[misc]
        if (folder := config.get("_name_or_path")) is not None:
            unify(self)
            attach_beside(self, Path(folder))
            align(self)

    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> None:
        """Write a folder for `from_pretrained`: base model, adapter, LoRA, and a reference to the index.

        Raises:
            UserError: if another LoRA than the adapter's is attached, or the adapter's is fused into the weights.
        """
        savable: Any = save_beside(self, Path(save_directory))
        savable.register_to_config(weight_dtype=str(self.unet.dtype).removeprefix("torch."))
        super(SavingMixin, savable).save_pretrained(save_directory, **arguments)  # type: ignore[misc]


def save_beside(pipeline: Any, folder: Path) -> Any:
    """Write the pipeline's LoRA, if there is one, and return a pipeline without it that shares all other weights.

    Also writes a file from which `DiffusionPipeline` loads the pipeline's class, if the user allows custom code.

    Raises:
        UserError: if another LoRA than the adapter's is attached, or the adapter's is fused into the weights.
    """
    names = set(getattr(pipeline.unet, "peft_config", {}))
    if others := names - {LORA_NAME}:
        raise UserError(
            f"a pipeline is saved with the LoRA that was trained with its adapter, and no other; {min(others)!r} is "
            "attached: take it off by unet.delete_adapters"
        )
    savable = pipeline
    if names:
        base = copy_without_lora(pipeline.unet)
        save_lora(pipeline.unet, folder / LORA)
        config = {name: pipeline.config[name] for name in pipeline._get_signature_keys(pipeline)[1]}
        savable = type(pipeline)(**pipeline.components | {"unet": base}, **config)
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
