"""ImageRAGTurbo as diffusers pipelines: Stable Diffusion with references from an index (paper, Sec. 3)."""

import warnings
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, PreTrainedModel, PreTrainedTokenizerBase

from imagerag.base.files import PAPERS_W
from imagerag.generation.reference_mixin import ImageRAGTurboOutput, ReferenceMixin
from imagerag.generation.signature import passing_on
from imagerag.hspace.adapter import HSpaceAdapter

__all__ = ["ImageRAGTurboOutput", "ImageRAGTurboPipeline", "ImageRAGTurboXLPipeline"]


class ImageRAGTurboPipeline(ReferenceMixin, StableDiffusionPipeline):  # type: ignore[misc]
    """Generates pictures with an SD 1 or 2 base model and references from an index.

    Base models are one-step students or multi-step teachers with guidance. The class extends diffusers'
    `StableDiffusionPipeline` and supports its features; without references, pictures are the same bit for bit.
    `from_base` and `from_pretrained` return an `ImageRAGTurboXLPipeline` for SDXL base models.
    """

    _optional_components = [*StableDiffusionPipeline._optional_components, "adapter"]  # noqa: RUF012 - as in diffusers

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = False,
        adapter: HSpaceAdapter | None = None,
        base_id: str | None = None,
        base_digest: str | None = None,
        index_uri: str | None = None,
        index_name: str | None = None,
        index_version: int | None = None,
        has_lora: bool = False,
        similarity_threshold: float = 0.0,
        slerp_w: float = PAPERS_W,
        weight_dtype: str | None = None,
    ) -> None:
        """Create a pipeline from its components; `from_base` and `from_pretrained` are easier.

        Args:
            vae: as in `StableDiffusionPipeline`, like all arguments up to `requires_safety_checker`.
            adapter: adapter that fuses references; without one, slerp is used.
            base_id: human-readable name of the base model.
            base_digest: digest of the base model, which selects its cached features; by default computed from the
                folder that the pipeline is loaded from.
            index_uri: URI of the LanceDB database with the index.
            index_name: name of the index's corpus.
            index_version: pinned version of the index; by default the published version.
            has_lora: whether the adapter was trained with LoRA, which `from_pretrained` loads from the same folder.
            similarity_threshold: references whose caption is less similar to the prompt have no effect.
            slerp_w: default slerp weight of the base model.
            weight_dtype: default dtype of `from_pretrained`, set by `save_pretrained`.
        """
        with warnings.catch_warnings():
            # Raised for scheduler configurations that diffusers considers outdated, such as Euler's own default.
            warnings.filterwarnings("ignore", "The configuration file of this scheduler", FutureWarning)
            super().__init__(
                vae=vae,
                text_encoder=text_encoder,
                tokenizer=tokenizer,
                unet=unet,
                scheduler=scheduler,
                safety_checker=safety_checker,
                feature_extractor=feature_extractor,
                image_encoder=image_encoder,
                requires_safety_checker=requires_safety_checker,
            )
        self._register_references(
            adapter,
            base_id=base_id,
            base_digest=base_digest,
            index_uri=index_uri,
            index_name=index_name,
            index_version=index_version,
            has_lora=has_lora,
            similarity_threshold=similarity_threshold,
            slerp_w=slerp_w,
            weight_dtype=weight_dtype,
        )

    @classmethod
    def _kind(cls, *, two_text_encoders: bool) -> Any:
        return ImageRAGTurboXLPipeline if two_text_encoders else cls

    @passing_on(ReferenceMixin.__call__, StableDiffusionPipeline.__call__)
    def __call__(self, **arguments: Any) -> Any:
        """Generate pictures; see `ReferenceMixin.__call__`, and diffusers for its other arguments."""
        return super().__call__(**arguments)


class ImageRAGTurboXLPipeline(ReferenceMixin, StableDiffusionXLPipeline):  # type: ignore[misc]
    """Generates pictures with an SDXL base model and references; extends diffusers' `StableDiffusionXLPipeline`."""

    _optional_components = [*StableDiffusionXLPipeline._optional_components, "adapter"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: PreTrainedModel,
        text_encoder_2: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokenizer_2: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        adapter: HSpaceAdapter | None = None,
        base_id: str | None = None,
        base_digest: str | None = None,
        index_uri: str | None = None,
        index_name: str | None = None,
        index_version: int | None = None,
        has_lora: bool = False,
        similarity_threshold: float = 0.0,
        slerp_w: float = PAPERS_W,
        weight_dtype: str | None = None,
    ) -> None:
        """Create a pipeline from its components; arguments as in `ImageRAGTurboPipeline` and its base class."""
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self._register_references(
            adapter,
            base_id=base_id,
            base_digest=base_digest,
            index_uri=index_uri,
            index_name=index_name,
            index_version=index_version,
            has_lora=has_lora,
            similarity_threshold=similarity_threshold,
            slerp_w=slerp_w,
            weight_dtype=weight_dtype,
        )

    @passing_on(ReferenceMixin.__call__, StableDiffusionXLPipeline.__call__)
    def __call__(self, **arguments: Any) -> Any:
        """Generate pictures; see `ReferenceMixin.__call__`, and diffusers for its other arguments."""
        return super().__call__(**arguments)
