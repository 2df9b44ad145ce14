"""Text conditioning of the mid block, trained in the H-space, where a picture has 3,072 values.

The third phase of a training, and the first of a student that starts from given weights. Only the mid block is trained.
Its inputs are cached for every drawing at t = 0 and for a pool of noises at T, and so are the targets: the `h` of the
drawings, which the decoder already reads. From noise and text, the mid block predicts the `h` of the coupled drawing;
from a drawing, it reproduces its former output, whatever the prompt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.hspace.split import encode
from imagerag.recipes.tiny_base.data import Prompts
from imagerag.recipes.tiny_base.latents import Latents
from imagerag.recipes.tiny_base.pictures import grid
from imagerag.recipes.tiny_base.teacher import build_scheduler, rebuild_from_h, sample, shown
from imagerag.training.diffusion import Diffusion
from imagerag.training.muon import Muon

LEARNING_RATE = 2e-3
REST_LEARNING_RATE = 4e-4
_BATCH_SIZE = 128
_DRAWINGS_IN_BATCH = _BATCH_SIZE // 8
_OTHER_PROMPTS = _DRAWINGS_IN_BATCH // 2
"""Number of drawings of a batch whose prompt is empty, or that of another drawing."""
_NUM_NOISES = 16384
_CACHED_AT_ONCE = 256


@dataclass(frozen=True)
class _MidBlock:
    """Cached inputs and outputs of the mid block, one row per picture."""

    inputs: torch.Tensor
    temb: torch.Tensor
    h: torch.Tensor


class PriorPhase:
    """Trains the mid block of `unet`, in place."""

    name = "prior"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        latents: Latents,
        prompts: Prompts,
        vae: AutoencoderKL,
        *,
        steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.steps = steps
        self.recipe = {"steps": steps, "seed": seed, "learning_rate": LEARNING_RATE, "batch_size": _BATCH_SIZE}
        self.recipe |= {"num_noises": _NUM_NOISES}
        self.unet = unet.to(device).eval().requires_grad_(False)
        self._latents, self._prompts, self._vae = latents, prompts, vae
        self._seed, self._device = seed, device
        self._diffusion = Diffusion(build_scheduler())
        generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(_NUM_NOISES, *latents.values.shape[1:], generator=generator)
        names = prompts.names(latents.concepts)
        self._of_drawings = self._cache(latents.values, 0, names)
        self._of_noises = self._cache(self._noise, self._diffusion.last, names[:1].expand(_NUM_NOISES, -1, -1))
        self._scale = self._of_drawings.h.std((0, 2, 3), keepdim=True)
        unet.mid_block.train().requires_grad_(True)
        self._optimizer = Muon(unet.mid_block.parameters(), LEARNING_RATE, REST_LEARNING_RATE)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            [LEARNING_RATE, REST_LEARNING_RATE],
            total_steps=steps,
            pct_start=min(0.05, 100 / steps),
            cycle_momentum=False,
        )

    def state(self) -> dict[str, Any]:
        """Return the objects to checkpoint by name."""
        return {"mid_block": self.unet.mid_block, "optimizer": self._optimizer, "schedule": self._schedule}

    def step(self, index: int) -> dict[str, float]:
        """Train on batch `index`, and return the losses."""
        rng = np.random.default_rng([self._seed, index])
        drawings = torch.from_numpy(rng.integers(len(self._latents.values), size=_BATCH_SIZE))
        noises = torch.from_numpy(rng.integers(_NUM_NOISES, size=_BATCH_SIZE - _DRAWINGS_IN_BATCH))
        made = slice(_DRAWINGS_IN_BATCH, None)
        drawings[made] = self._latents.chosen_by(self._noise[noises], self._latents.concepts[drawings[made]])
        concepts = self._latents.concepts[drawings]
        concepts[:_OTHER_PROMPTS] = concepts[:_OTHER_PROMPTS].roll(1)
        text = self._prompts.draw(concepts, rng)
        text[: _OTHER_PROMPTS // 2] = self._prompts.empty
        text = text.to(self._device)
        own = drawings[:_DRAWINGS_IN_BATCH]
        inputs = torch.cat([self._of_drawings.inputs[own], self._of_noises.inputs[noises]]).to(self._device)
        temb = torch.cat([self._of_drawings.temb[own], self._of_noises.temb[noises]]).to(self._device)
        # Contiguous, because GroupNorm's backward crashes on channels-last inputs without gradients (torch 2.13, CPU).
        h = self.unet.mid_block(inputs.contiguous(), temb, encoder_hidden_states=text)
        target = self._of_drawings.h[drawings]
        errors = F.mse_loss(
            h / self._scale.to(self._device), (target / self._scale).to(self._device), reduction="none"
        ).mean((1, 2, 3))
        self._optimizer.zero_grad()
        errors.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.unet.mid_block.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        return {"from_text": float(errors[made].mean().detach()), "kept": float(errors[: made.start].mean().detach())}

    @torch.inference_mode()
    def grid(self) -> Image.Image:
        """Return rows of drawings, their reconstructions from `h`, and one-step samples from three noises each."""
        latents, noise, text = shown(self._latents, self._prompts, self._device)
        rows = [latents, rebuild_from_h(self.unet, self._diffusion, latents, text)]
        rows += [sample(self.unet, noise.roll(shift, 0), text, text, steps=1) for shift in range(3)]
        return grid(self._vae.decode(torch.cat(rows)).sample, columns=len(latents))

    @torch.no_grad()
    def _cache(self, latents: torch.Tensor, timestep: int, text: torch.Tensor) -> _MidBlock:
        """Return inputs and outputs of the mid block for latents (N, C, H, W) and text features (N, L, D)."""
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        hook = self.unet.mid_block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
        outputs = []
        try:
            for part, own in zip(latents.split(_CACHED_AT_ONCE), text.split(_CACHED_AT_ONCE), strict=True):
                outputs.append(encode(self.unet, part.to(self._device), timestep, own.to(self._device)).h.cpu())
        finally:
            hook.remove()
        inputs, tembs = (torch.cat([each.cpu() for each in column]) for column in zip(*seen, strict=True))
        return _MidBlock(inputs, tembs, torch.cat(outputs))
