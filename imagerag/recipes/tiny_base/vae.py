"""First phase: the autoencoder, 128x128 pixels to 16x16x4 latents with mean 0 and deviation 1 per channel.

A half of each batch are drawings, and a half are augmented drawings and clip art, so that photographs can be encoded.
UNets are trained on the latents of one autoencoder. To improve the autoencoder without training them again, a training
can start from a former one: the new encoder then learns to give the former one's latents, also if the former one is for
pictures of half the size.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.recipes.tiny_base.anything import Cutouts, vary
from imagerag.recipes.tiny_base.data import Pictures
from imagerag.recipes.tiny_base.pictures import grid
from imagerag.training.muon import Muon

LEARNING_RATE = 2e-3
_BATCH_SIZE = 16
_GRADIENT_WEIGHT = 0.5
_KL_WEIGHT = 1e-4
_LATENT_NOISE = 0.03
"""Noise on the latents that the decoder learns from, if they are those of a former autoencoder."""
_LOGVAR_WEIGHT = 0.01
_KEPT_OF_CUTOUTS = 0.1
"""Weight of keeping a former autoencoder's latents of cutouts, which it may never have seen; that of drawings is 1."""


def build_vae() -> AutoencoderKL:
    """Return an autoencoder with random weights: 0.67M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
        force_upcast=False,
    )


class VaePhase:
    """Training of the autoencoder on drawings with L1, MSE and gradient losses, and a weak KL or latent loss."""

    name = "vae"

    def __init__(
        self,
        pictures: Pictures,
        drawings: Cutouts,
        others: Cutouts,
        shown: Pictures,
        *,
        steps: int,
        seed: int,
        device: torch.device,
        former: AutoencoderKL | None = None,
    ) -> None:
        """Initialise the autoencoder and its optimizer.

        Args:
            pictures: drawings to train on.
            drawings: the same as cutouts.
            others: other pictures as cutouts.
            shown: held-out drawings for the image grids.
            steps: training steps.
            seed: seed of weights and batches.
            device: device of the training.
            former: an autoencoder whose weights are the initial ones, and whose latents are kept.
        """
        torch.manual_seed(seed)
        self.steps = steps
        self.recipe = {"steps": steps, "seed": seed, "learning_rate": LEARNING_RATE, "batch_size": _BATCH_SIZE}
        self.recipe |= {"kl_weight": _KL_WEIGHT, "gradient_weight": _GRADIENT_WEIGHT}
        vae = build_vae() if former is None else enlarged(former)
        self.vae = vae.to(device, memory_format=torch.channels_last).train()
        self._former = None if former is None else former.to(device).eval().requires_grad_(False)
        self._pictures, self._shown, self._seed, self._device = pictures, shown, seed, device
        self._cutouts = (drawings, others, others)
        rates = [LEARNING_RATE, LEARNING_RATE / 4]
        self._optimizer = Muon(self.vae.parameters(), *rates)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, rates, total_steps=steps, pct_start=min(0.05, 100 / steps), cycle_momentum=False
        )

    def state(self) -> dict[str, Any]:
        """Return the objects to checkpoint by name."""
        return {"vae": self.vae, "optimizer": self._optimizer, "schedule": self._schedule}

    def step(self, index: int) -> dict[str, float]:
        """Train on batch `index`, and return the losses."""
        generator = torch.Generator().manual_seed(self._seed * 10**9 + index)
        torch.manual_seed(self._seed * 10**9 + index)  # seeds the sampling of latents
        pixels = self._draw(index, generator)
        posterior = self.vae.encode(pixels).latent_dist
        if self._former is None:
            latents, regularization = posterior.sample(), posterior.kl().mean() / posterior.mean[0].numel()
        else:
            latents = posterior.mean + _LATENT_NOISE * torch.randn_like(posterior.mean)
            regularization = self._change(posterior, pixels)
        rebuilt = self.vae.decode(latents).sample
        pixel = F.l1_loss(rebuilt, pixels) + F.mse_loss(rebuilt, pixels)
        edges = sum(F.l1_loss(rebuilt.diff(dim=d), pixels.diff(dim=d)) for d in (2, 3))
        weight = _KL_WEIGHT if self._former is None else 1.0
        loss = pixel + _GRADIENT_WEIGHT * edges + weight * regularization
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        return {"pixel": float(pixel), "edges": float(edges), "regularization": float(regularization)}

    def _draw(self, index: int, generator: torch.Generator) -> torch.Tensor:
        """Return the pictures (B, 3, H, W) of batch `index`, -1 to 1: drawings, some mirrored, and varied cutouts."""
        half, drawings = _BATCH_SIZE // 2, self._pictures.pixels
        chosen = drawings[torch.randint(len(drawings), (half,), generator=generator)]
        mirrored = torch.rand(half, 1, 1, 1, generator=generator) < 0.5
        chosen = to_input(torch.where(mirrored, chosen.flip(3), chosen), self._device)
        cutouts = self._cutouts[index % len(self._cutouts)].pixels
        varied = vary(cutouts[torch.randint(len(cutouts), (half,), generator=generator)], generator)
        return torch.cat([chosen, varied.to(self._device)]).contiguous(memory_format=torch.channels_last)

    def _change(self, posterior: DiagonalGaussianDistribution, pixels: torch.Tensor) -> torch.Tensor:
        """Return the squared error of the latents of a batch (B, 3, H, W) against those of the former autoencoder."""
        assert self._former is not None, "checked by the caller"
        former = encode_halved(self._former, pixels)
        drawings, cutouts = (posterior.mean - former.mean).square().chunk(2)
        kept: torch.Tensor = (drawings.mean() + _KEPT_OF_CUTOUTS * cutouts.mean()) / 2
        return kept + _LOGVAR_WEIGHT * F.mse_loss(posterior.logvar, former.logvar)

    @torch.inference_mode()
    def grid(self) -> Image.Image:
        """Return held-out drawings next to their reconstructions."""
        self.vae.eval()
        pixels = to_input(self._shown.pixels[:32], self._device)
        rebuilt = self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample
        self.vae.train()
        return grid(torch.stack([pixels, rebuilt], 1).flatten(0, 1), columns=16)


def enlarged(former: AutoencoderKL) -> AutoencoderKL:
    """Return an autoencoder for pictures of twice the size, with the former's weights in all layers that it has.

    A former one that has all layers is copied.
    """
    vae = build_vae()
    weights, own = vae.state_dict(), former.state_dict()
    shift = len(vae.config.block_out_channels) - len(former.config.block_out_channels)
    for name, value in weights.items():
        source = _moved(name, shift)
        if source in own and own[source].shape == value.shape:
            weights[name] = own[source]
    vae.load_state_dict(weights)
    return vae


def _moved(name: str, shift: int) -> str:
    """Return the name in an autoencoder of the weight called `name` in one with `shift` more levels, before the others.

    Decoders have their levels in reverse order, so theirs have the same names.
    """
    part, block, *rest = name.split(".")
    if part != "encoder" or not shift:
        return name
    if block != "down_blocks":
        return "" if block == "conv_in" else name
    level, *layer = rest
    return ".".join([part, block, str(int(level) - shift), *layer])


@torch.no_grad()
def encode_halved(former: AutoencoderKL, pixels: torch.Tensor) -> DiagonalGaussianDistribution:
    """Return the distribution of the latents of pictures (B, 3, H, W), halved if the former is for half the size."""
    side = former.config.sample_size
    if pixels.shape[-1] > side:
        pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return former.encode(pixels).latent_dist


def to_input(pixels: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Convert RGB bytes (B, 3, H, W) to the autoencoder's input (B, 3, H, W), -1 to 1."""
    return (pixels.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the latents (N, 4, H / 8, W / 8) of RGB bytes (N, 3, H, W)."""
    parts = [vae.encode(to_input(part, device)).latent_dist.mode().cpu() for part in pixels.split(64)]
    return torch.cat(parts).clone()


def normalize_latents(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Fold the normalisation of `latents` (N, C, H, W) into the 1x1 convolutions around the latents.

    The latents then have mean 0 and deviation 1 per channel, and the autoencoder has a scaling factor of 1.
    """
    mean = latents.mean((0, 2, 3)).to(vae.device)
    deviation = latents.std((0, 2, 3)).to(vae.device)
    channels = len(mean)
    with torch.no_grad():
        into, out = vae.quant_conv, vae.post_quant_conv
        into.weight[:channels] /= deviation.view(-1, 1, 1, 1)
        into.bias[:channels] = (into.bias[:channels] - mean) / deviation
        into.bias[channels:] -= 2 * deviation.log()
        out.bias += (out.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
        out.weight *= deviation.view(1, -1, 1, 1)
