"""Base models: text-to-image models in diffusers' format, one-step students and multi-step teachers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imagerag.base.files import PAPERS_W, BaseIdentity, Part, parts_of, read_json, resolve
from imagerag.base.text import TextConditioner
from imagerag.errors import UserError
from imagerag.workers import Dtype

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "BertModel")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The parts of a base model, on one device."""

    identity: BaseIdentity
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    text_encoders: tuple[PreTrainedModel, ...]
    slerp_w: float = PAPERS_W
    """Default slerp weight of the base model."""

    @property
    def conditioner(self) -> TextConditioner:
        """The text encoders with their tokenizers."""
        return TextConditioner(self.tokenizers, self.text_encoders)


def load_base(spec: str, device: str | None = None, dtype: Dtype | None = None) -> BaseModel:
    """Load a base model.

    Args:
        spec: `tiny`, `tiny-teacher`, a hub id and full commit (`stabilityai/sd-turbo@<40 hexadecimal digits>`), or a
            folder in diffusers' format. SD 1 and 2, SDXL, and models distilled from them.
        device: torch device; by default the GPU, if there is one.
        dtype: dtype of weights and computation; by default fp32 on the CPU and fp16 elsewhere.

    Raises:
        UserError: if there is no such model, a part is missing or of a wrong class, the UNet has no mid block, or its
            weights are pickles.
    """
    files = resolve(spec)
    check_mid_block(read_json(files.parts["unet"].files[0]))
    parts, names = files.parts, _towers(files.parts)
    device = device or default_device()
    torch_dtype = _DTYPES[dtype or default_dtype(device)]
    encoders = [_load_text_encoder(parts[f"text_encoder{name}"], torch_dtype) for name in names]
    return BaseModel(
        identity=files.identity,
        vae=_load(AutoencoderKL, parts["vae"], torch_dtype).to(device),
        unet=_load(UNet2DConditionModel, parts["unet"], torch_dtype).to(device),
        scheduler=load_scheduler(parts["scheduler"]),
        tokenizers=tuple(_load_tokenizer(parts[f"tokenizer{name}"]) for name in names),
        text_encoders=tuple(encoder.to(device) for encoder in encoders),
        slerp_w=files.slerp_w,
    )


def check_mid_block(unet_config: Mapping[str, Any]) -> None:
    """Check that a UNet has a mid block, whose output is the H-space (paper, Sec. 3.1).

    Raises:
        UserError: if it has none.
    """
    if "mid_block_type" in unet_config and unet_config["mid_block_type"] is None:  # by default it has one
        raise UserError(
            "references are fused into the output of the UNet's mid block, so a base model's UNet needs one; this "
            "one's mid_block_type is None"
        )


def default_device() -> str:
    """Return the default device: the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> Dtype:
    """Return the default dtype on a device."""
    return "fp32" if torch.device(device).type == "cpu" else "fp16"


def load_conditioner(spec: str) -> TextConditioner:
    """Load only tokenizers and text encoders, in fp32 on the CPU; `spec` and errors as in `load_base`."""
    parts = parts_of(spec, only=("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"))
    names = _towers(parts)
    encoders = [_load_text_encoder(parts[f"text_encoder{name}"], torch.float32) for name in names]
    return TextConditioner([_load_tokenizer(parts[f"tokenizer{name}"]) for name in names], encoders)


def _towers(parts: Mapping[str, Part]) -> list[str]:
    return [name for name in ("", "_2") if f"text_encoder{name}" in parts]


def _load(kind: type[ModelMixin], part: Part, dtype: torch.dtype) -> Any:
    _check_kind(part, read_json(part.files[0]).get("_class_name"), kind.__name__)
    with _readable(part):
        loaded = kind.from_pretrained(
            part.folder, torch_dtype=dtype, use_safetensors=True, variant=part.variant, local_files_only=True
        )
    return loaded.eval().requires_grad_(False)


def load_scheduler(part: Part) -> Any:
    """Load a base model's scheduler.

    Raises:
        UserError: if it is not a scheduler of diffusers.
    """
    import diffusers

    name = read_json(part.files[0]).get("_class_name")
    kind: Any = getattr(diffusers, str(name), None)
    is_scheduler = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not is_scheduler:
        raise UserError(f"{part.files[0]} names {name!r}, which is no scheduler of diffusers")
    return kind.from_pretrained(part.folder)


def _load_tokenizer(part: Part) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(part.folder, local_files_only=True)
    return tokenizer


def _load_text_encoder(part: Part, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    read_json(part.files[0])
    config = transformers.AutoConfig.from_pretrained(part.folder, local_files_only=True)
    kind = (config.architectures or ["nothing"])[0]
    _check_kind(part, kind, *_TEXT_ENCODERS)
    with _readable(part):
        encoder: PreTrainedModel = getattr(transformers, kind).from_pretrained(
            part.weights_folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            variant=part.variant,
            local_files_only=True,
        )
    return encoder.eval().requires_grad_(False)


@contextmanager
def _readable(part: Part) -> Iterator[None]:
    """Raise a `UserError` with the part's folder if its weights are truncated or don't fit their configuration."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights in {part.weights_folder} can't be loaded: {error}") from error


def _check_kind(part: Part, found: str | None, *expected: str) -> None:
    if found not in expected:
        name, kinds = part.folder.name, " or ".join(expected)
        raise UserError(f"a base model's {name} is a {kinds}; {part.files[0]} says {found!r}")
