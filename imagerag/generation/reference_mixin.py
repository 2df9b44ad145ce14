"""Mix-in that gives diffusers pipelines references from an index (paper, Sec. 3)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imagerag.base.files import BaseIdentity, identity_of_folder
from imagerag.base.text import LCM_GUIDANCE, TextConditioner
from imagerag.errors import UserError
from imagerag.generation.arguments import (
    Given,
    check_given,
    check_masks,
    check_output_type,
    check_queries,
    check_sampling,
    check_weights,
    count_prompts,
    in_list,
)
from imagerag.generation.options import FusionOptions, check_scale, of_guidance, warn_of_no_effect
from imagerag.generation.references import Reference, ReferenceIndex, References, given_references
from imagerag.generation.saving import SavingMixin
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.hspace.encode import encode_references
from imagerag.hspace.fit import DEFAULT_FIT
from imagerag.hspace.fusion import Fusion, FusionName
from imagerag.hspace.lora import without_lora
from imagerag.hspace.midblock import fusing, prepare
from imagerag.retrieval.schema import Embeds
from imagerag.storage.locks import local_folder


@dataclass
class ImageRAGTurboOutput(BaseOutput):  # type: ignore[misc]
    """Generated pictures with their references."""

    images: Any
    """Pictures, in the form that `output_type` selects."""
    references: list[tuple[Reference, ...]]
    """References of each picture, best first."""
    nsfw_content_detected: list[bool] | None = None
    """Result of the safety checker, if the pipeline has one."""


class ReferenceMixin(SavingMixin):
    """Mixed into a diffusers pipeline: fuses references of each prompt into the UNet's H-space."""

    config: Any
    vae: AutoencoderKL | AutoencoderTiny
    unet: UNet2DConditionModel
    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel | None
    tokenizer_2: PreTrainedTokenizerBase
    text_encoder_2: PreTrainedModel | None
    adapter: HSpaceAdapter | None
    register_modules: Callable[..., None]
    encode_prompt: Callable[..., Any]
    _execution_device: torch.device

    def _register_references(self, adapter: HSpaceAdapter | None, **config: Any) -> None:
        """Register the constructor's arguments that diffusers' pipeline does not have."""
        self.register_modules(adapter=adapter)
        self.register_to_config(**config)
        self._index: ReferenceIndex | None = None
        self._reference_scale: float | None = None
        if self.unet is not None:
            prepare(self.unet)

    def use_index(self, uri: str, name: str, version: int | None = None) -> Self:
        """Open the index of a corpus, and use its rows as references.

        Args:
            uri: URI of the LanceDB database.
            name: name of the corpus.
            version: version of the index to pin; by default the published version.

        Raises:
            UserError: if there is no such index or version, or it is empty. The pipeline then keeps its index.
        """
        folder = local_folder(uri)
        uri = uri if folder is None else str(folder.absolute())
        self._index = self._opened(uri, name, version)
        self.register_to_config(index_uri=uri, index_name=name, index_version=version)
        return self

    @property
    def index(self) -> ReferenceIndex | None:
        """The index that references come from, or None."""
        config = self.config
        if self._index is None and config.index_name is not None:
            self._index = self._opened(config.index_uri, config.index_name, config.index_version)
        return self._index

    def _opened(self, uri: str, name: str, version: int | None) -> ReferenceIndex:
        return ReferenceIndex(uri, name, self._base_identity(), self.unet.config, self.text_encoder, version)

    def _base_identity(self) -> BaseIdentity:
        if self.config.base_digest is None:
            identity = identity_of_folder(getattr(self.config, "_name_or_path", None))
            self.register_to_config(base_id=identity.id, base_digest=identity.digest)
        return BaseIdentity(id=self.config.base_id or "unnamed", digest=self.config.base_digest)

    def set_reference_scale(self, scale: float | None) -> None:
        """Set the default of `adapter_scale`; None restores the adapter's own `default_scale`.

        Raises:
            UserError: if the scale is not between 0 and 10.
        """
        if scale is not None:
            check_scale("the scale of references", scale)
        self._reference_scale = scale

    def is_guided(self, guidance_scale: float | None) -> bool:
        """Return whether a call has classifier-free guidance, without which a negative prompt has no effect."""
        is_input = self.unet.config.time_cond_proj_dim is not None
        return guidance_scale is not None and guidance_scale > 1 and not is_input

    def encode_queries(self, texts: Sequence[str]) -> Embeds:
        """Return embeddings of texts by the index's encoder (N, D).

        Raises:
            UserError: if the pipeline has no index.
        """
        return self._require_index().encode(texts, self._sentences)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        query: str | Sequence[str] | None = None,
        num_references: int | None = None,
        fusion: FusionName | None = None,
        w: float | None = None,
        adapter_scale: float | None = None,
        similarity_threshold: float | None = None,
        compose: bool = False,
        reference_ids: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        reference_images: Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        reference_captions: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        reference_weights: float | Sequence[float] | Sequence[Sequence[float]] | None = None,
        reference_masks: Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        strict: bool = False,
        num_inference_steps: int = 1,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **arguments: Any,
    ) -> ImageRAGTurboOutput | tuple[Any, ...]:
        """Generate pictures with references; further arguments are those of diffusers' pipeline.

        Args:
            prompt: a prompt or a batch of prompts.
            query: search query, or one per prompt, that also determines the similarity of references; by default the
                prompts. Required for a search with `prompt_embeds`, because embeddings can't be searched for.
            num_references: number per prompt; by default 4 for the adapter and 1 for slerp, at most the index's rows.
            fusion: fusion of references; by default the adapter if there is one, otherwise slerp if there are
                references. LoRA trained with the adapter is active only with this fusion.
            w: slerp weight: 1 is the base model, 0 the reference, -1 to 0 beyond the reference; by default the
                pipeline's `slerp_w`.
            adapter_scale: scale of the adapter's contribution, 0 to 10; 0 is the base model, bit for bit, and
                more is bolder. By default the scale of `set_reference_scale`, or the adapter's own `default_scale`.
            similarity_threshold: threshold for this call; by default the pipeline's own.
            compose: whether to also search for each thing that a prompt names.
            reference_ids: ids of index rows to use instead of a search: one list for all prompts, or one per prompt.
            reference_images: pictures of any shape to use instead of a search: one list for all prompts, or one per
                prompt. They are fitted into the base model's square like the index's images; without an index, by
                `fit_square` with `auto`.
            reference_captions: captions of `reference_images`; by default each prompt.
            reference_weights: factors of each reference's lambda, 0 to 10: one list for all prompts, or one per prompt.
                Slerp weighs a prompt's references only against each other.
            reference_masks: masks, white where a reference applies: one list for all prompts, or one per prompt. The
                H-space is coarse (8x8 at 512² for SD), and the decoder blends the edges.
            strict: whether references without cached features are an error; otherwise computed, with a warning.
            num_inference_steps: number of scheduler steps; 1 for a student.
            guidance_scale: scale of classifier-free guidance; off at 1 and below, which halves the cost, and by
                default. For a student with guidance as an input (LCM), the value of that input, by default 8.5.
            num_images_per_prompt: number of pictures per prompt, which are consecutive in the output.
            generator: generator of the noise; with a list of one per picture, a picture is the same in any batch.
            output_type: `pil`, `np` (N, H, W, 3), `pt` (N, 3, H, W), both 0 to 1, or `latent`.
            return_dict: whether to return an `ImageRAGTurboOutput` instead of a tuple.
            arguments: further arguments of diffusers' pipeline. If the height and width are not the base model's own,
                references are resampled in the H-space.

        Raises:
            UserError: if an argument is out of bounds, references are unavailable, or LoRA is fused into the weights of
                a call without it.
        """
        check_output_type(output_type)
        prompt = prompt if prompt is None or isinstance(prompt, str) else list(prompt)
        size = count_prompts(prompt, arguments.get("prompt_embeds"))
        check_sampling(size, num_inference_steps, num_images_per_prompt, generator)
        given = check_given(size, in_list(prompt), reference_ids, reference_images, reference_captions)
        options = FusionOptions.of(
            self, given, fusion, num_references, w=w, adapter_scale=adapter_scale, threshold=similarity_threshold
        )
        is_shown = options.fusion != "none" and bool(options.num_references or given.any)
        if not is_shown:
            warn_of_no_effect(
                "no references are used",
                reference_ids=reference_ids,
                reference_images=reference_images,
                reference_weights=reference_weights,
                reference_masks=reference_masks,
                num_references=num_references or None,
                query=query,
                compose=compose,
                similarity_threshold=similarity_threshold,
            )
        elif given.any:
            warn_of_no_effect("references are given", compose=compose, num_references=num_references)
        if guidance_scale is None:
            guidance_scale = 0.0 if self.unet.config.time_cond_proj_dim is None else LCM_GUIDANCE
        if not self.is_guided(guidance_scale):
            warn_of_no_effect("guidance is off", **of_guidance(arguments))
        arguments |= {"prompt": prompt, "guidance_scale": guidance_scale}

        references = None
        if is_shown:
            queries = check_queries(size, prompt if query is None else query, given)
            sentences, arguments = self._encode_once(arguments, self_queried=query is None)
            found = self._find_references(queries, sentences, given, options.num_references, compose, strict)
            if reference_weights is not None:
                factors = check_weights(size, reference_weights)
                found = found.times(factors)
                if options.ignores(factors, masked=reference_masks is not None):
                    warn_of_no_effect("slerp weighs references against each other", reference_weights=factors)
            if reference_masks is not None:
                found = found.within(check_masks(size, reference_masks))
            references = found.repeat_interleave(num_images_per_prompt)
        fuse = None if references is None else self._fusion(references, options)

        with_lora = options.fusion == "adapter" and options.adapter_scale
        with (
            nullcontext() if with_lora else without_lora(self.unet),
            fusing(self.unet, fuse, size * num_images_per_prompt),
        ):
            made = super().__call__(  # type: ignore[misc]
                num_inference_steps=num_inference_steps,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                output_type=output_type,
                return_dict=True,
                **arguments,
            )
        used: list[tuple[Reference, ...]] = [()] * len(made.images)
        if references is not None and fuse is not None:
            used = references.used(fuse.shares)
        output = ImageRAGTurboOutput(made.images, used, getattr(made, "nsfw_content_detected", None))
        return output if return_dict else output.to_tuple()

    def _encode_once(self, arguments: dict[str, Any], *, self_queried: bool) -> tuple[Embeds | None, dict[str, Any]]:
        """Return the prompts' sentence features, and the arguments with embeddings in place of the prompts.

        Prompts are thus encoded once for retrieval and generation, if the index has the base model's own text encoder.
        """
        prompt, negative = arguments["prompt"], arguments.get("negative_prompt_embeds")
        shares = self._makes_sentences and (self.index is None or self.index.shares_encoder)
        if not shares or not self_queried or prompt is None or arguments.get("prompt_embeds") is not None:
            return None, arguments
        embeds, negative = self.encode_prompt(
            prompt,
            self._execution_device,
            1,
            self.is_guided(arguments["guidance_scale"]),
            arguments.get("negative_prompt"),
            negative_prompt_embeds=negative,
            lora_scale=(arguments.get("cross_attention_kwargs") or {}).get("scale"),
            clip_skip=arguments.get("clip_skip"),
        )
        encoded = {"prompt": None, "prompt_embeds": embeds}
        encoded |= {"negative_prompt": None, "negative_prompt_embeds": negative}
        return _host(self._conditioner.sentences(in_list(prompt), embeds)), arguments | encoded

    def _fusion(self, references: References, options: FusionOptions) -> Fusion:
        """Return the fusion `F`, with its tensors on the pipeline's device."""
        device = self._execution_device
        h_references = references.features.to(device, self.unet.dtype)
        weights = references.gated(options.threshold).to(device)  # lambda
        masks = None if references.masks is None else references.masks.to(device)
        return options.fuse(self.adapter, h_references, weights, masks)

    def _find_references(
        self, queries: list[str], sentences: Embeds | None, given: Given, k: int, compose: bool, strict: bool
    ) -> References:
        """Return the given references, or the nearest rows of each query."""

        def encode_texts(texts: Sequence[str]) -> Embeds | None:
            return self._sentences(texts) if sentences is None or list(texts) != queries else sentences

        def encode_images(images: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
            fit = DEFAULT_FIT if self.index is None else self.index.identity.fit
            device = self._execution_device
            return encode_references(self.vae, self.unet, self._conditioner, images, captions, fit, device)

        if given.images is not None and given.captions is not None:
            embed = encode_texts if self.index is None else partial(self.index.encode, encode_texts=encode_texts)
            return given_references(queries, given.images, given.captions, embed, encode_images)
        index = self._require_index()
        if given.ids is not None:
            rows = index.fetch(given.ids, queries, encode_texts)
        else:
            rows = index.search(queries, encode_texts, k, compose=compose)
        return References.of(rows, index.features_of(rows, encode_images, strict=strict))

    def _require_index(self) -> ReferenceIndex:
        if self.index is None:
            raise UserError("references come from an index: give the pipeline one with use_index, or reference_images")
        return self.index

    def _sentences(self, texts: Sequence[str]) -> Embeds | None:
        """Return the base model's sentence features of texts (N, D), or None if it has none."""
        if not self._makes_sentences:
            return None
        return _host(self._conditioner.encode(texts, self._execution_device).sentences)

    @property
    def _makes_sentences(self) -> bool:
        return self._conditioner.makes_sentences

    @property
    def _conditioner(self) -> TextConditioner:
        towers = [(self.tokenizer, self.text_encoder)]
        towers += [(self.tokenizer_2, self.text_encoder_2)] if hasattr(self, "text_encoder_2") else []
        tokenizers, encoders = zip(*towers, strict=True)
        return TextConditioner(tokenizers, encoders)


def _host(sentences: torch.Tensor | None) -> Embeds | None:
    return None if sentences is None else sentences.float().cpu().numpy()
