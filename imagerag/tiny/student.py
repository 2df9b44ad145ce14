"""Fifth phase: the one-step student, distilled from the teacher by latent adversarial distillation.

It starts as the teacher, learns to hit the drawing that belongs to noise and text as well as one step can, which leaves
it blurred, and then to please the discriminator, which makes it sharp. A quarter of each batch goes on teaching the
decoder to read the H-space (see `teacher`).
"""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imagerag.tiny.data import Prompts
from imagerag.tiny.latents import Latents
from imagerag.tiny.pictures import grid
from imagerag.tiny.teacher import EMA_DECAY, build_scheduler, draw, predict, rebuild_from_h, sample, shown
from imagerag.training.config import LossWeights
from imagerag.training.diffusion import Diffusion
from imagerag.training.discriminator import Discriminator
from imagerag.training.ladd import Ladd, Terms

LEARNING_RATE = 4e-4
HEADS_LEARNING_RATE = 5e-4
WEIGHTS = LossWeights(adversarial=0.3, distillation=2.5, perceptual=0.0)
ADVERSARIAL_SHARE = 0.6
"""Of all steps, the last ones: a discriminator has little to teach to what is not even near, and takes its time."""
_MAX_TIMESTEP = 600
_BETAS = (0.5, 0.99)
_HEADS_BETAS = (0.0, 0.99)


class StudentPhase:
    """Learns to make in one step what the discriminator takes for a drawing of the concept."""

    name = "student"

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        latents: Latents,
        prompts: Prompts,
        vae: AutoencoderKL,
        *,
        steps: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """`student` has the teacher's weights, in memory of its own."""
        torch.manual_seed(seed)
        self.steps = steps
        self.recipe = {"steps": steps, "seed": seed, "learning_rate": LEARNING_RATE, "batch_size": batch_size}
        self.recipe |= {"heads_learning_rate": HEADS_LEARNING_RATE, "adversarial": WEIGHTS.adversarial}
        self.recipe |= {"distillation": WEIGHTS.distillation, "ema_decay": EMA_DECAY}
        self.recipe |= {"adversarial_share": ADVERSARIAL_SHARE}
        self.unet = student.to(device, memory_format=torch.channels_last).train()
        self.ema = AveragedModel(self.unet, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self._latents, self._prompts, self._vae = latents, prompts, vae
        self._batch_size, self._seed, self._device = batch_size, seed, device
        self._diffusion = Diffusion(build_scheduler())
        teacher.to(device, memory_format=torch.channels_last)
        self._discriminator = Discriminator(teacher, self._diffusion).to(device).train()
        self._ladd = Ladd(self._discriminator, self._diffusion, max_timestep=_MAX_TIMESTEP)
        self._adversarial_from = round(steps * (1 - ADVERSARIAL_SHARE))
        self._optimizer = torch.optim.AdamW(self.unet.parameters(), LEARNING_RATE, betas=_BETAS, weight_decay=1e-2)
        self._heads_optimizer = torch.optim.AdamW(
            self._discriminator.parameters(), HEADS_LEARNING_RATE, betas=_HEADS_BETAS, weight_decay=0.0
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.05, 100 / steps), cycle_momentum=False
        )

    def state(self) -> dict[str, Any]:
        """See `imagerag.training.loop.Phase`."""
        return {
            "unet": self.unet,
            "ema": self.ema,
            "discriminator": self._discriminator,
            "optimizer": self._optimizer,
            "heads_optimizer": self._heads_optimizer,
            "schedule": self._schedule,
        }

    def step(self, index: int) -> dict[str, float]:
        """See `imagerag.training.loop.Phase`."""
        rng = np.random.default_rng([self._seed, index])
        batch = draw(self._latents, self._batch_size, rng, self._diffusion, noised=False).to(self._device)
        text = self._prompts.draw(self._latents.concepts[batch.chosen.cpu()], rng).to(self._device)
        quarter = self._batch_size // 4
        target, prediction = predict(self.unet, self._diffusion, batch, text)
        fake, real, text = -prediction[quarter:], batch.latents[quarter:], text[quarter:]  # v at T
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))

        weights = WEIGHTS.model_copy(update={"adversarial": 0.0})
        terms: Terms = {}
        if index >= self._adversarial_from:
            weights, terms = WEIGHTS, self._judge(fake, real, text, generator)
        loss, of_generator = self._ladd.of_generator(fake, real, text, generator, weights)
        from_h = F.mse_loss(prediction[:quarter], target[:quarter])
        self._optimizer.zero_grad()
        (loss + from_h).backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.ema.update_parameters(self.unet)
        return {name: float(term) for name, term in (terms | of_generator | {"from_h": from_h.detach()}).items()}

    def _judge(self, fake: torch.Tensor, real: torch.Tensor, text: torch.Tensor, generator: torch.Generator) -> Terms:
        """Have the discriminator learn, and return its loss."""
        loss, terms = self._ladd.of_discriminator(fake, real, text, generator)
        self._heads_optimizer.zero_grad()
        loss.backward()
        self._heads_optimizer.step()
        return terms

    @torch.inference_mode()
    def grid(self) -> Image.Image:
        """Return drawings, what is rebuilt from their `h`, and one step from three noises each."""
        unet = self.ema.module.eval()
        latents, noise, text = shown(self._latents, self._prompts, self._device)
        rows = [latents, rebuild_from_h(unet, self._diffusion, latents, text)]
        rows += [sample(unet, noise.roll(shift, 0), text, text, steps=1) for shift in range(3)]
        return grid(self._vae.decode(torch.cat(rows)).sample, columns=16)
