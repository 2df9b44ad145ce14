"""ImageRAGTurbo as a diffusers pipeline: prompts, references of an index, one step (paper, Sec. 3)."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imagerag.errors import UserError
from imagerag.generation.arguments import Given, check_given, check_prompts, check_sampling
from imagerag.generation.base import BaseModel
from imagerag.generation.options import FusionOptions
from imagerag.generation.references import Reference, ReferenceIndex, References, given_references
from imagerag.generation.saving import align, attach_beside, save_beside
from imagerag.generation.spec import PAPERS_W, BaseIdentity
from imagerag.generation.text import Condition, TextConditioner, unet_arguments
from imagerag.hspace.adapter import HSpaceAdapter, gate
from imagerag.hspace.features import encode_references
from imagerag.hspace.fit import DEFAULT_FIT
from imagerag.hspace.fusion import AdapterFusion, Fusion, FusionName, SecondHalf, SlerpFusion
from imagerag.hspace.lora import without_lora
from imagerag.hspace.split import decode, encode
from imagerag.locks import local_folder
from imagerag.retrieval.schema import Embeds

OnStep = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Is told after each step: its number, its timestep and the latents (N, C, H, W)."""


@dataclass
class ImageRAGTurboOutput(BaseOutput):  # type: ignore[misc]
    """Pictures, and where they come from."""

    images: Any
    """As `output_type` says."""
    references: list[tuple[Reference, ...]]
    """What each picture was given of the index, the best first."""


class ImageRAGTurboPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Pictures of prompts by a base model, which is shown what an index has of them.

    Any base model works: one step of a student, or many of a teacher with guidance.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["tokenizer_2", "text_encoder_2", "adapter"]  # noqa: RUF012 - read from the class

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        adapter: HSpaceAdapter | None = None,
        base_id: str | None = None,
        base_digest: str | None = None,
        index_uri: str | None = None,
        index_name: str | None = None,
        index_version: int | None = None,
        has_lora: bool = False,
        similarity_threshold: float = 0.0,
        slerp_w: float = PAPERS_W,
    ) -> None:
        """Make a pipeline of its parts; `from_base` and `from_pretrained` are easier.

        Args:
            adapter: fuses references; without one there is slerp.
            base_id: the base model's name for people.
            base_digest: which base model it is, and so whose cached features it can use.
            index_uri: the LanceDB database with the index that references come from.
            index_name: its corpus.
            index_version: the version of it that is used, whatever is published; by default what is published.
            has_lora: whether LoRA belongs to the adapter, which `from_pretrained` then finds beside it.
            similarity_threshold: references whose caption is less similar to the prompt have no effect.
            slerp_w: the weight of the base model in slerp, unless a call names another.
        """
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            adapter=adapter,
        )
        self.register_to_config(
            base_id=base_id,
            base_digest=base_digest,
            index_uri=index_uri,
            index_name=index_name,
            index_version=index_version,
            has_lora=has_lora,
            similarity_threshold=similarity_threshold,
            slerp_w=slerp_w,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._index: ReferenceIndex | None = None

    @classmethod
    def from_base(cls, base: BaseModel, adapter: HSpaceAdapter | None = None) -> Self:
        """Return the pipeline of a loaded base model."""
        second = dict(
            zip(("tokenizer_2", "text_encoder_2"), (*base.tokenizers[1:], *base.text_encoders[1:]), strict=False)
        )
        pipeline = cls(
            vae=base.vae,
            unet=base.unet,
            scheduler=base.scheduler,
            tokenizer=base.tokenizers[0],
            text_encoder=base.text_encoders[0],
            adapter=adapter,
            base_id=base.identity.id,
            base_digest=base.identity.digest,
            slerp_w=base.slerp_w,
            **second,
        )
        align(pipeline)
        return pipeline

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Self:
        """Load what `save_pretrained` or `imagerag pull` wrote, or any base model in diffusers' format.

        Raises:
            UserError: if LoRA belongs to it and is not there.
        """
        pipeline: Self = super().from_pretrained(pretrained_model_name_or_path, **arguments)
        attach_beside(pipeline, Path(pretrained_model_name_or_path))
        align(pipeline)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> None:
        """Write the pipeline as `from_pretrained` reads it: base model, adapter, LoRA, and which index it uses.

        Raises:
            UserError: if LoRA is attached that is not the adapter's.
        """
        savable = save_beside(self, Path(save_directory))
        super(ImageRAGTurboPipeline, savable).save_pretrained(save_directory, **arguments)

    def use_index(self, uri: str, name: str, version: int | None = None) -> Self:
        """Take references from the index of a corpus, opened now.

        Args:
            uri: the LanceDB database.
            name: the corpus.
            version: the one to stay on; by default the published one.

        Raises:
            UserError: if there is no such index or version, or it is empty.
        """
        folder = local_folder(uri)
        uri = uri if folder is None else str(folder.absolute())
        self.register_to_config(index_uri=uri, index_name=name, index_version=version)
        self._index = None
        assert self.index is not None, (uri, name)
        return self

    @property
    def index(self) -> ReferenceIndex | None:
        """Where references come from, if there is an index."""
        if self._index is None and self.config.index_name is not None:
            if self.config.base_digest is None:
                raise UserError("a pipeline that isn't told its base_digest can't use an index's cached features")
            base = BaseIdentity(id=self.config.base_id or "unnamed", digest=self.config.base_digest)
            config = self.config
            self._index = ReferenceIndex(
                config.index_uri, config.index_name, base, self.unet.config, self.text_encoder, config.index_version
            )
        return self._index

    def encode_queries(self, texts: Sequence[str]) -> Embeds:
        """Return texts as the index's encoder sees them (N, D).

        Raises:
            UserError: if the pipeline has no index.
        """
        return self._require_index().encode(texts, self._sentences)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_references: int | None = None,
        fusion: FusionName | None = None,
        w: float | None = None,
        adapter_scale: float | None = None,
        similarity_threshold: float | None = None,
        compose: bool = False,
        reference_ids: Sequence[str] | Sequence[Sequence[str]] | None = None,
        reference_images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        reference_captions: Sequence[str] | Sequence[Sequence[str]] | None = None,
        strict: bool = False,
        num_inference_steps: int = 1,
        guidance_scale: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: OnStep | None = None,
    ) -> ImageRAGTurboOutput:
        """Make pictures.

        Args:
            prompt: one, or a batch of them.
            num_references: how many rows of the index each prompt is given; by default 4 for the adapter and 1 for
                slerp, or all of a smaller index.
            fusion: how they are fused; by default by the adapter if there is one, else by slerp if there is an index.
                LoRA that was trained with the adapter is used with it alone; without it there is the base model.
            w: of slerp: 1 is the base model, 0 the reference; by default the base model's own `slerp_w`.
            adapter_scale: of what the adapter adds, 0 to 10: 0 is the base model, bit for bit, and more is bolder; by
                default the adapter's own `default_scale`.
            similarity_threshold: instead of the pipeline's own.
            compose: whether to look for each thing that a prompt names by itself.
            reference_ids: rows of the index to use instead of a search, the same for all prompts or a list for each.
            reference_images: pictures of any shape to use instead of a search, likewise. They are fitted into the base
                model's square as the index's are, and without an index as `fit_square` does it by `auto`.
            reference_captions: what they show.
            strict: whether references without cached features are an error, rather than computed now with a warning.
            num_inference_steps: of the scheduler; 1 for a student.
            guidance_scale: of classifier-free guidance; 1 and less mean none, which costs half. A student that was
                distilled with guidance as an input (LCM) is given it as that.
            num_images_per_prompt: pictures of a prompt follow each other.
            generator: of the noise; a list has one for each picture, which makes a picture the same in any batch.
            latents: the noise (N, C, H, W) itself.
            output_type: `pil`, `np` (N, H, W, 3), `pt` (N, 3, H, W), each 0 to 1, or `latent`.
            callback_on_step_end: is told of each step.

        Raises:
            UserError: if an argument is out of its bounds, or references can't be had.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_prompts(prompts)
        check_sampling(len(prompts), num_inference_steps, num_images_per_prompt, generator)
        given = check_given(len(prompts), reference_ids, reference_images, reference_captions)
        options = FusionOptions.of(
            self, given, fusion, num_references, w=w, adapter_scale=adapter_scale, threshold=similarity_threshold
        )

        condition = self._conditioner.encode(prompts)  # tau(p_tgt)
        references = None
        if options.fusion != "none" and (options.num_references or given.any):
            found = self._find_references(prompts, condition, given, options.num_references, compose, strict)
            references = found.repeat_interleave(num_images_per_prompt)
        fuse = None if references is None else self._fusion(references, options)

        with nullcontext() if options.fusion == "adapter" and options.adapter_scale else without_lora(self.unet):
            latents = self._sample(
                self._noise(len(prompts) * num_images_per_prompt, generator, latents),  # z_T
                condition.repeat_interleave(num_images_per_prompt),
                fuse,
                num_inference_steps,
                guidance_scale,
                generator,
                callback_on_step_end,
            )
        used: list[tuple[Reference, ...]] = [()] * len(latents)
        if references is not None and fuse is not None:
            used = references.used(fuse.shares)
        return ImageRAGTurboOutput(images=self._decode(latents, output_type), references=used)

    def _sample(
        self,
        latents: torch.Tensor,
        condition: Condition,
        fuse: Fusion | None,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        on_step: OnStep | None,
    ) -> torch.Tensor:
        """Return clean latents `z_0` of noise `z_T`."""
        guided = guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
        if guided:
            condition = self._conditioner.encode_empty(len(condition.embeds)).followed_by(condition)
            fuse = None if fuse is None else SecondHalf(fuse)
        pixels = self.unet.config.sample_size * self.vae_scale_factor
        arguments = unet_arguments(self.unet, condition, side=pixels, guidance_scale=guidance_scale)

        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        latents = latents * self.scheduler.init_noise_sigma
        steps = self._step_arguments(generator)
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            sample = self.scheduler.scale_model_input(torch.cat([latents] * (1 + guided)), timestep)
            prediction = self._predict(sample, timestep, arguments, fuse)
            if guided:
                without, with_text = prediction.chunk(2)
                prediction = without + guidance_scale * (with_text - without)
            stepped = self.scheduler.step(prediction, timestep, latents, **steps)
            latents = stepped.prev_sample
            if on_step is not None:
                on_step(index, timestep, latents)
        # LCM's scheduler hands on noised latents, and the clean ones beside them.
        return getattr(stepped, "denoised", latents)

    def _predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, arguments: dict[str, Any], fuse: Fusion | None
    ) -> torch.Tensor:
        """Return the UNet's prediction: `D(F(h_tgt, h_retr), skips_tgt)`, where `h_tgt = E(z_t, t, tau(p_tgt))`."""
        target = encode(self.unet, sample, timestep, **arguments)
        h = target.h if fuse is None else fuse(target.h)
        return decode(self.unet, replace(target, h=h))

    def _fusion(self, references: References, options: FusionOptions) -> Fusion:
        """Return `F`, with all that it needs on the device."""
        device, dtype = self._execution_device, self.unet.dtype
        h_references = references.features.to(device, dtype)
        weights = gate(references.similarities, options.threshold).to(device)  # lambda
        if options.fusion == "adapter":
            return AdapterFusion(self.adapter, h_references, weights, options.adapter_scale)
        return SlerpFusion(h_references, weights, options.w)

    def _find_references(
        self, prompts: list[str], condition: Condition, given: Given, k: int, compose: bool, strict: bool
    ) -> References:
        """Return what is nearest to each prompt, or what was given."""

        def encode_texts(texts: Sequence[str]) -> Embeds | None:
            return _host(condition.sentences) if list(texts) == prompts else self._sentences(texts)

        def encode_images(images: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
            fit = DEFAULT_FIT if self.index is None else self.index.identity.fit
            return encode_references(self.vae, self.unet, self._conditioner, images, captions, fit)

        if given.images is not None and given.captions is not None:
            embed = encode_texts if self.index is None else partial(self.index.encode, encode_texts=encode_texts)
            return given_references(prompts, given.images, given.captions, embed, encode_images)
        index = self._require_index()
        if given.ids is not None:
            rows = index.fetch(given.ids, prompts, encode_texts)
        else:
            rows = index.search(prompts, encode_texts, k, compose=compose)
        return References.of(rows, index.features_of(rows, encode_images, strict=strict))

    def _require_index(self) -> ReferenceIndex:
        if self.index is None:
            raise UserError("references come from an index: give the pipeline one with use_index, or reference_images")
        return self.index

    def _sentences(self, texts: Sequence[str]) -> Embeds | None:
        return _host(self._conditioner.encode(texts).sentences)

    @property
    def _conditioner(self) -> TextConditioner:
        towers = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        tokenizers, encoders = zip(*((t, e) for t, e in towers if e is not None), strict=True)
        return TextConditioner(tokenizers, encoders)

    def _noise(
        self, size: int, generator: torch.Generator | list[torch.Generator] | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        side = self.unet.config.sample_size
        shape = (size, self.unet.config.in_channels, side, side)
        if latents is not None and tuple(latents.shape) != shape:
            raise UserError(f"latents have the shape {shape} for these prompts; got {tuple(latents.shape)}")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        return latents.to(self._execution_device, self.unet.dtype)

    def _step_arguments(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in accepted else {}

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        pixels = self.vae.decode(scaled, return_dict=False)[0]
        return self.image_processor.postprocess(pixels, output_type=output_type)


def _host(sentences: torch.Tensor | None) -> Embeds | None:
    return None if sentences is None else sentences.float().cpu().numpy()
