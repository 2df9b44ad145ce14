"""Measures of how much picture information the H-space of the embedded base model carries, as fusion requires."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from imagerag.base.model import BaseModel
from imagerag.evaluation.intervals import Estimate, estimate
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.fit import fit_square
from imagerag.recipes.tiny_base.teacher import build_scheduler, rebuild_from_h
from imagerag.training.diffusion import Diffusion


@dataclass(frozen=True, kw_only=True)
class Measures:
    """H-space measures of one UNet."""

    rebuilding: Estimate
    """Mean squared error of latents (variance 1) reconstructed from their `h` at t = 0 alone."""
    zeroing: float
    """Mean squared change of the one-step output when `h` is zero, relative to the output's variance."""
    shuffling: float
    """The same when `h` is exchanged within the batch; about 2 for independent pictures."""


def read(base: BaseModel, images: Sequence[Image.Image], captions: Sequence[str]) -> Estimate:
    """Return the PSNR in dB of pictures reconstructed with themselves as references.

    Fusion is slerp with w = 0, so only their `h` is used. The prompt is the caption.

    Args:
        base: the base model.
        images: pictures of any shape; they are padded to squares.
        captions: their captions.
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
    """Measure a UNet on latents (N, C, H, W) of drawings and text features (N, L, D) of their names."""
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
