"""Latent adversarial distillation, one step of it in plain torch (LADD, arXiv 2403.12015; paper, Sec. 3.4)."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.training.diffusion import Diffusion
from imagerag.training.discriminator import Discriminator, discriminator_loss, generator_loss


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the generator's losses; zero switches one off."""

    adversarial: float = 1.0
    distillation: float = 2.5


class Ladd:
    """The losses of a one-step generator and of its discriminator."""

    def __init__(
        self,
        discriminator: Discriminator,
        diffusion: Diffusion,
        *,
        max_timestep: int | None = None,
    ) -> None:
        """Args: max_timestep: latents are judged noised to a timestep below it; by default any of all."""
        self.discriminator = discriminator
        self._max_timestep = max_timestep or diffusion.num_timesteps

    def of_discriminator(
        self, fake: torch.Tensor, real: torch.Tensor, text: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Return the discriminator's loss on latents (B, C, H, W), both noised alike."""
        noise, timesteps = self._noising(fake, generator)
        twice = [torch.cat([each, each]) for each in (noise, timesteps, text)]
        logits = self.discriminator(torch.cat([real, fake.detach()]), *twice)
        return discriminator_loss(*logits.chunk(2))

    def of_generator(
        self,
        fake: torch.Tensor,
        real: torch.Tensor,
        text: torch.Tensor,
        generator: torch.Generator,
        weights: LossWeights,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the generator's loss and its terms, before their weights."""
        terms: dict[str, torch.Tensor] = {}
        if weights.adversarial:
            noise, timesteps = self._noising(fake, generator)
            self.discriminator.requires_grad_(False)
            terms["adversarial"] = generator_loss(self.discriminator(fake, noise, timesteps, text))
            self.discriminator.requires_grad_(True)
        if weights.distillation:
            terms["distillation"] = F.smooth_l1_loss(fake, real)
        loss = sum((getattr(weights, name) * term for name, term in terms.items()), torch.zeros(()))
        return loss, {name: float(term.detach()) for name, term in terms.items()}

    def _noising(self, latents: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        timesteps = torch.randint(self._max_timestep, (len(latents),), generator=generator).to(latents.device)
        return noise, timesteps
