"""One-step text-to-image generation as a diffusers pipeline (paper, Sec. 3.1)."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imagerag.errors import UserError
from imagerag.generation.base import BaseModel
from imagerag.generation.text import Condition, TextConditioner, unet_arguments

OnStep = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Is told after each step: its number, its timestep and the latents (N, C, H, W)."""
MAX_STEPS = 1000


class ImageRAGTurboPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Pictures of prompts by any base model: one step of a student, or many of a teacher with guidance."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["tokenizer_2", "text_encoder_2"]  # noqa: RUF012 - diffusers reads it from the class

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_base(cls, base: BaseModel) -> Self:
        """Return the pipeline of a loaded base model."""
        second = dict(
            zip(("tokenizer_2", "text_encoder_2"), (*base.tokenizers[1:], *base.text_encoders[1:]), strict=False)
        )
        return cls(
            vae=base.vae,
            unet=base.unet,
            scheduler=base.scheduler,
            tokenizer=base.tokenizers[0],
            text_encoder=base.text_encoders[0],
            **second,
        )

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 1,
        guidance_scale: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: OnStep | None = None,
    ) -> StableDiffusionPipelineOutput:
        """Make pictures.

        Args:
            prompt: one, or a batch of them.
            num_inference_steps: of the scheduler; 1 for a student.
            guidance_scale: of classifier-free guidance; 1 and less mean none, which costs half. A student that was
                distilled with guidance as an input (LCM) is given it as that.
            num_images_per_prompt: pictures of a prompt follow each other.
            generator: of the noise; a list has one for each picture, which makes a picture the same in any batch.
            latents: the noise (N, C, H, W) itself.
            output_type: `pil`, `np` (N, H, W, 3), `pt` (N, 3, H, W), each 0 to 1, or `latent`.
            callback_on_step_end: is told of each step.

        Raises:
            UserError: if an argument is out of its bounds.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check(prompts, num_inference_steps, num_images_per_prompt, generator)
        device, dtype = self._execution_device, self.unet.dtype
        guided = guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
        condition = self._encode(prompts, num_images_per_prompt, guided)
        side = self.unet.config.sample_size
        size = len(prompts) * num_images_per_prompt
        if latents is None:
            shape = (size, self.unet.config.in_channels, side, side)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        pixels = side * self.vae_scale_factor
        arguments = unet_arguments(self.unet, condition, side=pixels, guidance_scale=guidance_scale)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        steps = self._step_arguments(generator)
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            sample = self.scheduler.scale_model_input(torch.cat([latents] * (1 + guided)), timestep)
            prediction = self.unet(sample, timestep, **arguments).sample
            if guided:
                without, with_text = prediction.chunk(2)
                prediction = without + guidance_scale * (with_text - without)
            stepped = self.scheduler.step(prediction, timestep, latents, **steps)
            latents = stepped.prev_sample
            if callback_on_step_end is not None:
                callback_on_step_end(index, timestep, latents)
        # LCM's scheduler hands on noised latents, and the clean ones beside them.
        latents = getattr(stepped, "denoised", latents)
        return StableDiffusionPipelineOutput(images=self._decode(latents, output_type), nsfw_content_detected=None)

    def _encode(self, prompts: list[str], num_images_per_prompt: int, guided: bool) -> Condition:
        towers = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        tokenizers, encoders = zip(*((t, e) for t, e in towers if e is not None), strict=True)
        conditioner = TextConditioner(tokenizers, encoders)
        condition = conditioner.encode(prompts).repeat_interleave(num_images_per_prompt)
        if not guided:
            return condition
        return conditioner.encode_empty(len(condition.embeds)).followed_by(condition)

    def _step_arguments(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in accepted else {}

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        pixels = self.vae.decode(scaled, return_dict=False)[0]
        return self.image_processor.postprocess(pixels, output_type=output_type)


def _check(
    prompts: Sequence[str],
    num_inference_steps: int,
    num_images_per_prompt: int,
    generator: torch.Generator | list[torch.Generator] | None,
) -> None:
    if not prompts:
        raise UserError("at least one prompt is needed")
    if not 1 <= num_inference_steps <= MAX_STEPS:
        raise UserError(f"the number of steps must be between 1 and {MAX_STEPS}; got {num_inference_steps}")
    if num_images_per_prompt < 1:
        raise UserError(f"at least 1 picture of a prompt can be made; got {num_images_per_prompt}")
    size = len(prompts) * num_images_per_prompt
    if isinstance(generator, list) and len(generator) != size:
        raise UserError(f"a list of generators has one for each of the {size} pictures; got {len(generator)}")
