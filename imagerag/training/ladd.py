"""Losses of latent adversarial distillation in plain torch (LADD, arXiv 2403.12015; paper, Sec. 3.4)."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.errors import UserError
from imagerag.training.config import LossWeights
from imagerag.training.diffusion import Diffusion
from imagerag.training.discriminator import discriminator_loss, generator_loss
from imagerag.training.perceptual import Perceptual

Added = Mapping[str, torch.Tensor]
"""SDXL's `added_cond_kwargs`: pooled text features and sizes, by name."""
Terms = dict[str, torch.Tensor]
"""Unweighted losses and other metrics by name, detached and still on the device."""


class Ladd:
    """Losses of a one-step generator and its discriminator."""

    def __init__(
        self,
        discriminator: nn.Module,
        diffusion: Diffusion,
        *,
        perceptual: Perceptual | None = None,
        learner: nn.Module | None = None,
        max_timestep: int | None = None,
    ) -> None:
        """Initialise the losses.

        Args:
            discriminator: a discriminator of `imagerag.training.discriminator`.
            diffusion: the diffusion process, for its number of timesteps.
            perceptual: distance of the perceptual loss; required if the loss has a weight.
            learner: `discriminator` wrapped for its own update (DDP); None uses it unwrapped.
            max_timestep: exclusive upper bound of the discriminator's timesteps; None uses all timesteps.

        Raises:
            UserError: if `max_timestep` exceeds the number of timesteps.
        """
        if max_timestep is not None and max_timestep > diffusion.num_timesteps:
            raise UserError(
                f"max_timestep must not exceed the base model's {diffusion.num_timesteps} timesteps, got {max_timestep}"
            )
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
        """Return the discriminator's loss and its terms, including its accuracy.

        Args:
            fake: generated latents (B, C, H, W).
            real: real latents (B, C, H, W), noised with the same noise and timesteps.
            text: text features (B, L, D).
            generator: draws noise and timesteps.
            added: further conditions of an SDXL teacher.
        """
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
        """Return the generator's weighted loss and its unweighted terms.

        Args:
            fake: generated latents (B, C, H, W).
            real: real latents (B, C, H, W).
            text: text features (B, L, D).
            generator: draws noise, timesteps and augmentations.
            weights: loss weights; losses with weight 0 are not computed.
            added: further conditions of an SDXL teacher.

        Raises:
            ValueError: if the perceptual loss has a weight but no network.
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
                raise ValueError(f"the perceptual loss has weight {weights.perceptual} but no network")
            terms["perceptual"] = self._perceptual(fake, real, generator)
        start = torch.zeros((), device=fake.device)
        loss = sum((getattr(weights, name) * term for name, term in terms.items()), start)
        return loss, {name: term.detach() for name, term in terms.items()}

    def _noising(self, latents: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        device = generator.device
        noise = torch.randn(latents.shape, generator=generator, device=device).to(latents.device)
        timesteps = torch.randint(self._max_timestep, (len(latents),), generator=generator, device=device)
        return noise, timesteps.to(latents.device)
