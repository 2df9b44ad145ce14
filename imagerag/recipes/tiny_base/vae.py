"""First phase: the autoencoder, 64x64 pixels to 16x16x4 latents with mean 0 and deviation 1 per channel."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.recipes.tiny_base.data import Pictures
from imagerag.recipes.tiny_base.pictures import grid

LEARNING_RATE = 2e-3
_BATCH_SIZE = 16
_GRADIENT_WEIGHT = 0.5
_KL_WEIGHT = 1e-4


def build_vae() -> AutoencoderKL:
    """Return an autoencoder with random weights: 0.65M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
        force_upcast=False,
    )


class VaePhase:
    """Training of the autoencoder on drawings with L1, MSE and gradient losses, and a weak KL term."""

    name = "vae"

    def __init__(self, pictures: Pictures, shown: Pictures, *, steps: int, seed: int, device: torch.device) -> None:
        """Initialise the autoencoder and its optimizer.

        Args:
            pictures: drawings to train on.
            shown: held-out drawings for the image grids.
            steps: training steps.
            seed: seed of weights and batches.
            device: device of the training.
        """
        torch.manual_seed(seed)
        self.steps = steps
        self.recipe = {"steps": steps, "seed": seed, "learning_rate": LEARNING_RATE, "batch_size": _BATCH_SIZE}
        self.recipe |= {"kl_weight": _KL_WEIGHT, "gradient_weight": _GRADIENT_WEIGHT}
        self.vae = build_vae().to(device, memory_format=torch.channels_last).train()
        self._pictures, self._shown, self._seed, self._device = pictures, shown, seed, device
        self._optimizer = torch.optim.AdamW(self.vae.parameters(), LEARNING_RATE, weight_decay=1e-4)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.05, 100 / steps)
        )

    def state(self) -> dict[str, Any]:
        """Return the objects to checkpoint by name."""
        return {"vae": self.vae, "optimizer": self._optimizer, "schedule": self._schedule}

    def step(self, index: int) -> dict[str, float]:
        """Train on batch `index`, and return the losses."""
        generator = torch.Generator().manual_seed(self._seed * 10**9 + index)
        torch.manual_seed(self._seed * 10**9 + index)  # seeds the sampling of latents
        chosen = torch.randint(len(self._pictures.pixels), (_BATCH_SIZE,), generator=generator)
        pixels = self._pictures.pixels[chosen]
        mirrored = torch.rand(_BATCH_SIZE, 1, 1, 1, generator=generator) < 0.5
        pixels = to_input(torch.where(mirrored, pixels.flip(3), pixels), self._device)
        posterior = self.vae.encode(pixels).latent_dist
        rebuilt = self.vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        pixel = F.l1_loss(rebuilt, pixels) + F.mse_loss(rebuilt, pixels)
        edges = sum(F.l1_loss(rebuilt.diff(dim=d), pixels.diff(dim=d)) for d in (2, 3))
        loss = pixel + _GRADIENT_WEIGHT * edges + _KL_WEIGHT * kl
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        return {"pixel": float(pixel), "edges": float(edges), "kl": float(kl)}

    @torch.inference_mode()
    def grid(self) -> Image.Image:
        """Return held-out drawings next to their reconstructions."""
        self.vae.eval()
        pixels = to_input(self._shown.pixels[:32], self._device)
        rebuilt = self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample
        self.vae.train()
        return grid(torch.stack([pixels, rebuilt], 1).flatten(0, 1), columns=16)


def to_input(pixels: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Convert RGB bytes (B, 3, H, W) to the autoencoder's input (B, 3, H, W), -1 to 1."""
    return (pixels.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the latents (N, 4, H / 4, W / 4) of RGB bytes (N, 3, H, W)."""
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
