"""The discriminators of latent adversarial distillation: who tells generated latents from real ones.

`TeacherDiscriminator` is LADD's (arXiv 2403.12015): heads on the features of a frozen teacher. The features of a
teacher as small as the embedded one tell little about how sharp a picture is, and heads on them stay near chance;
`LatentDiscriminator` is a convolutional network of its own that learns from scratch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from imagerag.hspace.split import encode
from imagerag.training.diffusion import Diffusion

_WIDTH = 64
_CHANNELS = (96, 128, 192)
"""Of `LatentDiscriminator` at the latents' resolution, a half and a quarter of it."""
_GAIN = 2.0
"""Of its layers. With 1, a spectral norm of 1 leaves a fiftieth of the signal after five layers, and with it of the
gradient; with 2, half."""


class Head(nn.Module):
    """Judges one depth's features at every position, given the text."""

    def __init__(self, channels: int, text_dim: int) -> None:
        super().__init__()
        # It starts with a convolution: GroupNorm's backward crashes on channels-last features that need no gradient
        # (torch 2.13 on the CPU).
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
        """Return logits (B, H * W) of features (B, C, H, W) and pooled text (B, D)."""
        features = self.features(features)
        agreement = (features * self.text(text)[:, :, None, None]).mean(1, keepdim=True)
        logits: torch.Tensor = self.realness(features) + agreement
        return logits.flatten(1)


class TeacherDiscriminator(nn.Module):
    """Heads that learn, on the features of a teacher that does not."""

    def __init__(self, teacher: UNet2DConditionModel, diffusion: Diffusion) -> None:
        super().__init__()
        # In a list, so that it is neither among the parameters nor in the state.
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
        """Return logits (B, N), N positions over all depths: high where latents look real.

        Args:
            latents: z_0 (B, C, H, W).
            noise: of the same shape; `latents` are noised with it.
            timesteps: (B,).
            text: features (B, L, D).
            added: what a teacher of SDXL is told beside them, its `added_cond_kwargs`.
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
        # A block's last output before its downsampler, so the deepest at every resolution.
        skips, last = list(encoded.skips[1:]), len(teacher.down_blocks) - 1
        for index, block in enumerate(teacher.down_blocks):
            outputs, skips = skips[: len(block.resnets)], skips[len(block.resnets) + (index < last) :]
            yield outputs[-1]
        yield encoded.h


class LatentDiscriminator(nn.Module):
    """A convolutional network on noised latents, with the timestep as a channel and a projection of the text."""

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
        """Return logits (B, H * W / 16): see `TeacherDiscriminator`."""
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
    """Return a new discriminator for the latents and the text features of `teacher`."""
    if kind == "teacher":
        return TeacherDiscriminator(teacher, diffusion)
    return LatentDiscriminator(teacher.config.in_channels, teacher.config.cross_attention_dim, diffusion)


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator's logits (arXiv 1705.02894)."""
    return nn.functional.relu(1 - real).mean() + nn.functional.relu(1 + fake).mean()


def generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the generator."""
    return -fake.mean()
