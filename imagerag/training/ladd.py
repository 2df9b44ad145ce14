"""Latent adversarial distillation, its losses in plain torch (LADD, arXiv 2403.12015; paper, Sec. 3.4)."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.training.config import LossWeights
from imagerag.training.diffusion import Diffusion
from imagerag.training.discriminator import discriminator_loss, generator_loss
from imagerag.training.perceptual import Perceptual

Added = Mapping[str, torch.Tensor]
"""What a teacher of SDXL is told beside the text, its `added_cond_kwargs`."""
Terms = dict[str, torch.Tensor]
"""Losses before their weights and what else is of interest, without a graph and still on the device."""


class Ladd:
    """The losses of a one-step generator and of its discriminator."""

    def __init__(
        self,
        discriminator: nn.Module,
        diffusion: Diffusion,
        *,
        perceptual: Perceptual | None = None,
        learner: nn.Module | None = None,
        max_timestep: int | None = None,
    ) -> None:
        """Take what judges.

        Args:
            discriminator: judges latents, see `imagerag.training.discriminator`.
            diffusion: noises them.
            perceptual: the distance of the perceptual loss, where that has a weight.
            learner: the discriminator as it learns, where that is wrapped (DDP).
            max_timestep: latents are judged noised to a timestep below it; by default any of all.
        """
        self.discriminator = discriminator
        self._learner = learner or discriminator
        self._perceptual = perceptual
        self._max_timestep = max_timestep or diffusion.num_timesteps

    def of_discriminator(
        self,
        fake: torch.Tensor,
        real: torch.Tensor,
        text: torch.Tensor,
        generator: torch.Generator,
        added: Added | None = None,
    ) -> tuple[torch.Tensor, Terms]:
        """Return the discriminator's loss on latents (B, C, H, W), both noised alike, and its accuracy."""
        noise, timesteps = self._noising(fake, generator)
        twice = [torch.cat([each, each]) for each in (noise, timesteps, text)]
        added = {name: torch.cat([each, each]) for name, each in (added or {}).items()}
        of_real, of_fake = self._learner(torch.cat([real, fake.detach()]), *twice, added).chunk(2)
        loss = discriminator_loss(of_real, of_fake)
        accuracy = ((of_real > 0).float().mean() + (of_fake < 0).float().mean()) / 2
        return loss, {"discriminator": loss.detach(), "accuracy": accuracy}

    def of_generator(
        self,
        fake: torch.Tensor,
        real: torch.Tensor,
        text: torch.Tensor,
        generator: torch.Generator,
        weights: LossWeights,
        added: Added | None = None,
    ) -> tuple[torch.Tensor, Terms]:
        """Return the generator's loss and its terms.

        Raises:
            ValueError: if the perceptual loss has a weight and no network.
        """
        terms: Terms = {}
        if weights.adversarial:
            noise, timesteps = self._noising(fake, generator)
            self.discriminator.requires_grad_(False)
            terms["adversarial"] = generator_loss(self.discriminator(fake, noise, timesteps, text, added))
            self.discriminator.requires_grad_(True)
        if weights.distillation:
            terms["distillation"] = F.smooth_l1_loss(fake, real)
        if weights.perceptual:
            if self._perceptual is None:
                raise ValueError(f"the perceptual loss has the weight {weights.perceptual} and no network")
            terms["perceptual"] = self._perceptual(fake, real, generator)
        start = torch.zeros((), device=fake.device)
        loss = sum((getattr(weights, name) * term for name, term in terms.items()), start)
        return loss, {name: term.detach() for name, term in terms.items()}

    def _noising(self, latents: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        device = generator.device
        noise = torch.randn(latents.shape, generator=generator, device=device).to(latents.device)
        timesteps = torch.randint(self._max_timestep, (len(latents),), generator=generator, device=device)
        return noise, timesteps.to(latents.device)
