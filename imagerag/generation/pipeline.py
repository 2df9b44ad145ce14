"""ImageRAGTurbo as pipelines of diffusers: Stable Diffusion's, with references of an index (paper, Sec. 3)."""

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

from imagerag.generation.reference_mixin import ImageRAGTurboOutput, ReferenceMixin
from imagerag.generation.signature import passing_on
from imagerag.generation.spec import PAPERS_W
from imagerag.hspace.adapter import HSpaceAdapter

__all__ = ["ImageRAGTurboOutput", "ImageRAGTurboPipeline", "ImageRAGTurboXLPipeline"]


class ImageRAGTurboPipeline(ReferenceMixin, StableDiffusionPipeline):  # type: ignore[misc]
    """Pictures of prompts by a base model of SD 1 or 2, which is shown what an index has of them.

    Any base model works: one step of a student, or many of a teacher with guidance. It is diffusers' own
    `StableDiffusionPipeline`, so all that works with that does with this, and without references its pictures are the
    same, bit for bit. `from_base` and `from_pretrained` make an `ImageRAGTurboXLPipeline` for a base model of SDXL.
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
        """Make a pipeline of its parts; `from_base` and `from_pretrained` are easier.

        Args:
            vae: and what follows, as `StableDiffusionPipeline` takes them.
            adapter: fuses references; without one there is slerp.
            base_id: the base model's name for people.
            base_digest: which base model it is, and so whose cached features it can use; by default of the folder that
                the pipeline is loaded from.
            index_uri: the LanceDB database with the index that references come from.
            index_name: its corpus.
            index_version: the version of it that is used, whatever is published; by default what is published.
            has_lora: whether LoRA belongs to the adapter, which `from_pretrained` then finds beside it.
            similarity_threshold: references whose caption is less similar to the prompt have no effect.
            slerp_w: the weight of the base model in slerp, unless a call names another.
            weight_dtype: what `from_pretrained` loads it in unless it is told another; `save_pretrained` sets it.
        """
        with warnings.catch_warnings():
            # Of a scheduler's configuration that is old in diffusers' eyes, as Euler's own default is.
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
        """Make pictures; see `ReferenceMixin`, and diffusers for the rest."""
        return super().__call__(**arguments)


class ImageRAGTurboXLPipeline(ReferenceMixin, StableDiffusionXLPipeline):  # type: ignore[misc]
    """The same for a base model of SDXL, as `StableDiffusionXLPipeline`."""

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
        """Make a pipeline of its parts, as `ImageRAGTurboPipeline` and `StableDiffusionXLPipeline` take them."""
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
        """Make pictures; see `ReferenceMixin`, and diffusers for the rest."""
        return super().__call__(**arguments)
