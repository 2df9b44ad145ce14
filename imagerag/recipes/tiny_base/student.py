"""Sixth phase: the one-step student, trained by latent adversarial distillation and reconstruction from the H-space.

A part of each batch is generated in one step from noise and text, with the losses of `Ladd`: regression to the coupled
drawing, a perceptual loss and an adversarial loss. The others train encoder and decoder to reconstruct pictures from
their `h` at t = 0 alone, including unlabelled pictures (`anything`): this limits how much of a reference fusion can
transfer. An alignment loss keeps the `h` of generated rows near that of drawings.
"""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imagerag.recipes.tiny_base.anything import Cutouts, vary
from imagerag.recipes.tiny_base.data import Prompts
from imagerag.recipes.tiny_base.latents import Latents
from imagerag.recipes.tiny_base.pictures import grid
from imagerag.recipes.tiny_base.teacher import (
    EMA_DECAY,
    Batch,
    build_scheduler,
    compose,
    predict,
    rebuild_from_h,
    sample,
    shown,
)
from imagerag.training.config import LossWeights
from imagerag.training.diffusion import Diffusion
from imagerag.training.discriminator import LatentDiscriminator
from imagerag.training.ladd import Ladd, Terms
from imagerag.training.muon import Muon
from imagerag.training.perceptual import Perceptual

LEARNING_RATE = 6e-4
REST_LEARNING_RATE = 2e-4
HEADS_LEARNING_RATE = 5e-4
WEIGHTS = LossWeights(adversarial=0.3, distillation=1.0, perceptual=1.0)
READING_WEIGHT = 10.0
_PERCEPTUAL_READING = 0.05
_MAX_TIMESTEP = 300
"""Exclusive upper bound of the discriminator's timesteps: with more noise, sharp and blurred latents look alike."""
_ADVERSARIAL_AFTER = 300
"""Steps until the adversarial loss has its full weight: that of an untrained discriminator is misleading."""
_HEADS_BETAS = (0.0, 0.99)
_ALIGNMENT_WEIGHT = 0.5
_SHARES = (0.25, 0.125, 0.125)
"""Shares of reconstruction rows: drawings, augmented drawings and augmented other pictures. The rest is generated, and
the reconstructed drawings are the targets of the first generated rows."""
_EMPTY_PROMPTS = 0.25
"""Share of reconstructed rows with the empty prompt."""


class StudentPhase:
    """Training of the one-step student."""

    name = "student"

    def __init__(
        self,
        student: UNet2DConditionModel,
        perceptual: Perceptual,
        drawings: Cutouts,
        others: Cutouts,
        latents: Latents,
        prompts: Prompts,
        vae: AutoencoderKL,
        *,
        steps: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Initialise the discriminator, the optimizers and the EMA.

        Args:
            student: UNet with the initial weights; trained in place.
            perceptual: distance of the perceptual loss.
            drawings: the drawings of `latents` as cutouts.
            others: other pictures as cutouts, without captions.
            latents: latents of the drawings.
            prompts: text features of the prompts.
            vae: the autoencoder.
            steps: training steps.
            batch_size: rows per step.
            seed: seed of weights and batches.
            device: device of the training.
        """
        torch.manual_seed(seed)
        self.steps = steps
        self.recipe: dict[str, Any] = {"steps": steps, "seed": seed, "learning_rate": LEARNING_RATE}
        self.recipe |= {"batch_size": batch_size}
        self.recipe |= {"heads_learning_rate": HEADS_LEARNING_RATE, "ema_decay": EMA_DECAY}
        self.recipe |= {"weights": WEIGHTS.model_dump(), "reading_weight": READING_WEIGHT, "others": others.digest}
        self.recipe |= {"alignment_weight": _ALIGNMENT_WEIGHT, "shares": _SHARES}
        self.unet = student.to(device, memory_format=torch.channels_last).train().requires_grad_(True)
        self.ema = AveragedModel(self.unet, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self._drawings, self._others = drawings, others
        self._latents, self._prompts, self._vae, self._perceptual = latents, prompts, vae, perceptual
        self._batch_size, self._seed, self._device = batch_size, seed, device
        self._diffusion = Diffusion(build_scheduler())
        channels, text_dim = student.config.in_channels, student.config.cross_attention_dim
        self._discriminator = LatentDiscriminator(channels, text_dim, self._diffusion).to(device).train()
        self._ladd = Ladd(self._discriminator, self._diffusion, perceptual=perceptual, max_timestep=_MAX_TIMESTEP)
        self._optimizer = Muon(self.unet.parameters(), LEARNING_RATE, REST_LEARNING_RATE)
        self._heads_optimizer = torch.optim.AdamW(
            self._discriminator.parameters(), HEADS_LEARNING_RATE, betas=_HEADS_BETAS, weight_decay=0.0
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            [LEARNING_RATE, REST_LEARNING_RATE],
            total_steps=steps,
            pct_start=min(0.05, 100 / steps),
            cycle_momentum=False,
        )

    def state(self) -> dict[str, Any]:
        """Return the objects to checkpoint by name."""
        return {
            "unet": self.unet,
            "ema": self.ema,
            "discriminator": self._discriminator,
            "optimizer": self._optimizer,
            "heads_optimizer": self._heads_optimizer,
            "schedule": self._schedule,
        }

    def step(self, index: int) -> dict[str, float]:
        """Train on batch `index`, and return the losses."""
        rng = np.random.default_rng([self._seed, index])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        batch, text = self._draw(rng, generator)
        batch, text = batch.to(self._device), text.to(self._device)
        _, prediction, h = predict(self.unet, self._diffusion, batch, text)
        clean, made = -prediction, slice(batch.num_read, None)  # v at T
        fake, real, text = clean[made], batch.latents[made], text[made]

        terms = self._judge(fake, real, text, generator)
        adversarial = WEIGHTS.adversarial * min(1.0, (index + 1) / _ADVERSARIAL_AFTER)
        weights = WEIGHTS.model_copy(update={"adversarial": adversarial})
        loss, of_generator = self._ladd.of_generator(fake, real, text, generator, weights)
        read, wanted = clean[: batch.num_read], batch.latents[: batch.num_read]
        reading = F.mse_loss(read, wanted)
        alike = self._perceptual(read, wanted, generator)
        aligned = self._misalignment(h[made], h[: batch.num_read])
        self._optimizer.zero_grad()
        (loss + READING_WEIGHT * (reading + _PERCEPTUAL_READING * alike) + _ALIGNMENT_WEIGHT * aligned).backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.ema.update_parameters(self.unet)
        terms |= of_generator | {"reading": reading.detach(), "alignment": aligned.detach()}
        return {name: float(term) for name, term in terms.items()}

    def _misalignment(self, of_made: torch.Tensor, of_read: torch.Tensor) -> torch.Tensor:
        """Return the error of the `h` of generated rows (B, C, H, W) against that of the same drawings.

        Both are read by one decoder, and fusion interpolates between them.
        """
        count = round(_SHARES[0] * self._batch_size)
        target = of_read[:count].detach()
        scale = target.std((0, 2, 3), keepdim=True)
        return F.mse_loss(of_made[:count] / scale, target / scale)

    def _draw(self, rng: np.random.Generator, generator: torch.Generator) -> tuple[Batch, torch.Tensor]:
        """Return a random batch and its text features (B, L, D)."""
        plain, varied, others = (round(share * self._batch_size) for share in _SHARES)
        chosen = torch.from_numpy(rng.integers(len(self._latents.values), size=self._batch_size - others))
        cutouts = [self._drawings.pixels[chosen[plain : plain + varied]]]
        cutouts += [self._others.pixels[rng.integers(len(self._others.pixels), size=others)]]
        pixels = torch.cat([vary(each, generator) for each in cutouts]).to(self._device)
        with torch.no_grad():
            encoded = self._vae.encode(pixels).latent_dist.mode().cpu()
        own = self._latents.values[chosen]
        num_made = len(chosen) - plain - varied
        latents = torch.cat([own[:plain], encoded, own[plain + varied :]])
        batch = compose(latents, plain + varied + others, num_made, rng, self._diffusion)
        made = slice(-num_made, None)
        chosen[made] = self._latents.chosen_by(batch.noise[made], self._latents.concepts[chosen[made]])
        chosen[:plain] = chosen[made][:plain]
        batch.latents[made] = self._latents.values[chosen[made]]
        batch.latents[:plain] = batch.latents[made][:plain]
        concepts = self._latents.concepts[chosen]
        # Unlabelled pictures get random prompts, so that reconstruction does not depend on text.
        others_text = self._prompts.draw(
            self._latents.concepts[rng.integers(len(self._latents.values), size=others)], rng, drop=_EMPTY_PROMPTS
        )
        read_text = self._prompts.draw(concepts[: plain + varied], rng, drop=_EMPTY_PROMPTS)
        return batch, torch.cat([read_text, others_text, self._prompts.draw(concepts[made], rng)])

    def _judge(self, fake: torch.Tensor, real: torch.Tensor, text: torch.Tensor, generator: torch.Generator) -> Terms:
        """Update the discriminator, and return its loss and accuracy."""
        loss, terms = self._ladd.of_discriminator(fake, real, text, generator)
        self._heads_optimizer.zero_grad()
        loss.backward()
        self._heads_optimizer.step()
        return terms

    @torch.inference_mode()
    def grid(self) -> Image.Image:
        """Return rows of drawings, their reconstructions from `h`, and one-step samples from three noises each."""
        unet = self.ema.module.eval()
        latents, noise, text = shown(self._latents, self._prompts, self._device)
        rows = [latents, rebuild_from_h(unet, self._diffusion, latents, text)]
        rows += [sample(unet, noise.roll(shift, 0), text, text, steps=1) for shift in range(3)]
        return grid(self._vae.decode(torch.cat(rows)).sample, columns=len(latents))
