"""Whether the H-space of the embedded base model carries the picture, which fusion in it rests on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from imagerag.evaluation.intervals import Estimate, estimate
from imagerag.generation.base import BaseModel
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.fit import fit_square
from imagerag.tiny.teacher import build_scheduler, rebuild_from_h
from imagerag.training.diffusion import Diffusion


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Of one UNet."""

    rebuilding: Estimate
    """Mean squared error of latents that are rebuilt from their `h` at t = 0 alone; theirs have a variance of one."""
    zeroing: float
    """How much of the one-step output's variance changes when `h` is zero."""
    shuffling: float
    """How much changes when every row gets another row's `h`. More than all, where each is another picture."""


def read(base: BaseModel, images: Sequence[Image.Image], captions: Sequence[str]) -> Estimate:
    """Return how well pictures are shown that are given as their own references: PSNR in dB.

    Nothing but their `h` is used, as by slerp with w = 0. The prompt is the caption, and all of a picture is fitted
    into the base model's square.
    """
    pipeline = ImageRAGTurboPipeline.from_base(base)
    pipeline.set_progress_bar_config(disable=True)
    side = base.unet.config.sample_size * pipeline.vae_scale_factor
    decibels = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        square = fit_square(image, side, "pad")
        shown = pipeline(
            caption, reference_images=[square], reference_captions=[caption], fusion="slerp", w=0.0, output_type="np",
            generator=torch.Generator().manual_seed(number),
        ).images[0]  # fmt: skip
        decibels.append(-10 * np.log10(np.square(shown - np.asarray(square) / 255).mean()))
    return estimate(decibels)


@torch.inference_mode()
def measure(unet: UNet2DConditionModel, latents: torch.Tensor, text: torch.Tensor) -> Measures:
    """Measure with latents (N, C, H, W) of drawings and the text features (N, L, D) of their names."""
    diffusion = Diffusion(build_scheduler())
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    def one_step() -> torch.Tensor:
        parts = zip(noise.split(64), text.split(64), strict=True)
        return torch.cat([-unet(each, diffusion.last, own).sample for each, own in parts])

    def changed_by(change: str) -> float:
        def hook(_: torch.nn.Module, __: object, h: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(h) if change == "zero" else h.roll(1, 0)

        handle = unet.mid_block.register_forward_hook(hook)
        try:
            changed = one_step()
        finally:
            handle.remove()
        return float((changed - made).square().mean() / made.var(0).mean())

    made = one_step()
    parts = zip(latents.split(64), text.split(64), strict=True)
    rebuilt = torch.cat([rebuild_from_h(unet, diffusion, each, own) for each, own in parts])
    errors = (rebuilt - latents).square().mean((1, 2, 3))
    return Measures(rebuilding=estimate(errors.numpy()), zeroing=changed_by("zero"), shuffling=changed_by("shuffle"))
