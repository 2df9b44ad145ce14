"""Discriminators for latent adversarial distillation.

`TeacherDiscriminator` is LADD's (arXiv 2403.12015): trainable heads on the features of a frozen teacher. The features
of the small embedded teacher contain little about sharpness, and heads on them stay near chance. For such teachers,
`LatentDiscriminator` is a convolutional network that is trained from scratch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import ParametrizationList

from imagerag.hspace.split import encode
from imagerag.training.diffusion import Diffusion

_WIDTH = 64
_CHANNELS = (96, 128, 192)
"""Channels of `LatentDiscriminator` at full, half and quarter resolution of the latents."""
_GAIN = 2.0
"""Gain of the layers of `LatentDiscriminator`. Under spectral normalisation, a gain of 1 reduces signal and gradient to
a fiftieth over five layers; a gain of 2 halves them."""


class Head(nn.Module):
    """Text-conditioned discriminator head on the features of one depth, with one logit per position."""

    def __init__(self, channels: int, text_dim: int) -> None:
        super().__init__()
        # Starts with a convolution, because GroupNorm's backward crashes on channels-last inputs without gradients
        # (torch 2.13, CPU).
        self.features = nn.Sequential(
            spectral_norm(nn.Conv2d(channels, _WIDTH, 3, padding=1)),
            nn.GroupNorm(8, _WIDTH),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1)),
            nn.LeakyReLU(0.2),
        )
        self.realness = spectral_norm(nn.Conv2d(_WIDTH, 1, 1))
        self.text = spectral_norm(nn.Linear(text_dim, _WIDTH))

    def forward(self, features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return logits (B, H * W) for features (B, C, H, W) and pooled text features (B, D)."""
        features = self.features(features)
        agreement = (features * self.text(text)[:, :, None, None]).mean(1, keepdim=True)
        logits: torch.Tensor = self.realness(features) + agreement
        return logits.flatten(1)


class TeacherDiscriminator(nn.Module):
    """Trainable heads on a frozen teacher's features: the deepest of each resolution, and the mid block's."""

    def __init__(self, teacher: UNet2DConditionModel, diffusion: Diffusion) -> None:
        super().__init__()
        # In a list, so that the teacher is not registered as a submodule (no parameters, no state).
        self._teacher = [teacher.eval().requires_grad_(False)]
        self._diffusion = diffusion
        channels: Sequence[int] = teacher.config.block_out_channels
        self.heads = nn.ModuleList(Head(c, teacher.config.cross_attention_dim) for c in (*channels, channels[-1]))

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        added: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return logits (B, N) over the positions of all depths; high logits mean real.

        Args:
            latents: clean latents z_0 (B, C, H, W).
            noise: noise added to the latents (B, C, H, W).
            timesteps: timesteps of the noised latents (B,).
            text: text features (B, L, D).
            added: SDXL's `added_cond_kwargs`; None for other teachers.
        """
        noised = self._diffusion.add_noise(latents, noise, timesteps)
        pooled = text.mean(1)
        features = self._features(noised, timesteps, text, added)
        return torch.cat([head(each, pooled) for head, each in zip(self.heads, features, strict=True)], dim=1)

    def _features(
        self,
        noised: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        added: Mapping[str, torch.Tensor] | None,
    ) -> Iterable[torch.Tensor]:
        teacher = self._teacher[0]
        encoded = encode(teacher, noised, timesteps, text, added_cond_kwargs=added)
        # The last output of each block before its downsampler: the deepest features at each resolution.
        skips, last = list(encoded.skips[1:]), len(teacher.down_blocks) - 1
        for index, block in enumerate(teacher.down_blocks):
            outputs, skips = skips[: len(block.resnets)], skips[len(block.resnets) + (index < last) :]
            yield outputs[-1]
        yield encoded.h


class LatentDiscriminator(nn.Module):
    """Convolutional discriminator on noised latents, with the timestep as a channel and a text projection."""

    def __init__(self, latent_channels: int, text_dim: int, diffusion: Diffusion) -> None:
        super().__init__()
        self._diffusion = diffusion
        outer, middle, inner = _CHANNELS
        layers = (
            (latent_channels + 1, outer, 1),
            (outer, outer, 1),
            (outer, middle, 2),
            (middle, inner, 2),
            (inner, inner, 1),
        )
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 3, stride, padding=1)) for before, after, stride in layers
        )
        self.realness = spectral_norm(nn.Conv2d(inner, 1, 1))
        self.text = spectral_norm(nn.Linear(text_dim, inner))

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        added: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return logits (B, H * W / 16), one per output position; high logits mean real.

        Args:
            latents: clean latents z_0 (B, C, H, W).
            noise: noise added to the latents (B, C, H, W).
            timesteps: timesteps of the noised latents (B,).
            text: text features (B, L, D).
            added: not used; SDXL's `added_cond_kwargs`, for the same signature as `TeacherDiscriminator`.
        """
        noised = self._diffusion.add_noise(latents, noise, timesteps)
        time = (timesteps / self._diffusion.num_timesteps).to(noised.dtype).view(-1, 1, 1, 1)
        features = torch.cat([noised, time.expand(-1, 1, *noised.shape[2:])], dim=1)
        for layer in self.layers:
            features = nn.functional.leaky_relu(_GAIN * layer(features), 0.2)
        agreement = (features * self.text(text.mean(1))[:, :, None, None]).mean(1, keepdim=True)
        logits: torch.Tensor = _GAIN * (self.realness(features) + agreement)
        return logits.flatten(1)


def build_discriminator(
    kind: Literal["teacher", "latents"], teacher: UNet2DConditionModel, diffusion: Diffusion
) -> TeacherDiscriminator | LatentDiscriminator:
    """Return an untrained discriminator for the latents and text features of `teacher`."""
    if kind == "teacher":
        return TeacherDiscriminator(teacher, diffusion)
    return LatentDiscriminator(teacher.config.in_channels, teacher.config.cross_attention_dim, diffusion)


def iterate_norms(discriminator: nn.Module) -> None:
    """Do one power iteration of each spectral norm, and keep the estimates until the next call.

    Without this, each forward pass in training mode does one, and a step would depend on its number of micro-batches
    and workers.
    """
    for norm in discriminator.modules():
        if isinstance(norm, ParametrizationList):
            norm.train()
            with torch.no_grad():
                norm()
            norm.eval()


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return the discriminator's hinge loss from its logits on real and fake latents (arXiv 1705.02894)."""
    return nn.functional.relu(1 - real).mean() + nn.functional.relu(1 + fake).mean()


def generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """Return the generator's hinge loss from the discriminator's logits on fake latents."""
    return -fake.mean()
