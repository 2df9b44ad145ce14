"""Second and fourth phase: v-prediction training of a UNet whose mid block alone attends to the text.

A batch has three kinds of rows. Reconstruction rows train the decoder to read pictures from the H-space: the encoder
sees an almost clean drawing, and the decoder gets only its `h`, with timestep T and with skip connections that are zero
or from pure noise. So `h` has the same meaning at t = 0 (a reference) and at t = T (a generated picture), which fusion
in the H-space requires (paper, Sec. 3.1). Rows of pure noise train the student's one step. The remaining rows are
noised to random timesteps, as usual. The second phase uses a quarter, a quarter and a half; the fourth, which trains
the multi-step teacher, has no reconstruction rows.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imagerag.hspace.split import EncoderOutput, decode, encode
from imagerag.recipes.tiny_base.data import Prompts
from imagerag.recipes.tiny_base.latents import Latents
from imagerag.recipes.tiny_base.pictures import grid
from imagerag.training.diffusion import Diffusion
from imagerag.training.muon import Muon

EMA_DECAY = 0.998
_REST_LEARNING_RATE = 4e-4
_EMPTY_PROMPTS = 0.1
_ALMOST_CLEAN = 30
"""Exclusive upper bound of the timesteps of reconstruction rows: the picture is almost noise-free."""
_DROPPED_SKIPS = 0.15
"""Share of reconstruction rows with zero skip connections."""
_MID_LAYERS = 4
"""Transformer layers of the mid block, which alone attends to the text."""
_GRID_STEPS = (1, 25)
_NUM_SHOWN = 16


def build_unet() -> UNet2DConditionModel:
    """Return a UNet with random weights: 8.9M parameters, H-space 192x4x4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",) * 3,
        block_out_channels=(48, 96, 192),
        layers_per_block=1,
        transformer_layers_per_block=_MID_LAYERS,
        cross_attention_dim=384,
        attention_head_dim=6,
        norm_num_groups=16,
    )


def deepened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a UNet with the same outputs and as many transformer layers in the mid block as `build_unet` has.

    The output projections of the added layers are zero.
    """
    before = unet.config.transformer_layers_per_block
    deep = build_unet()
    deep.load_state_dict(unet.state_dict(), strict=before == _MID_LAYERS)
    for attention in deep.mid_block.attentions:
        for layer in attention.transformer_blocks[before:]:
            for linear in (layer.attn1.to_out[0], layer.attn2.to_out[0], layer.ff.net[-1]):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
    return deep


def build_scheduler() -> EulerDiscreteScheduler:
    """Return the scheduler: Stable Diffusion's betas, rescaled to zero terminal SNR (arXiv 2305.08891)."""
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


class TeacherPhase:
    """v-prediction training on the latents of drawings."""

    def __init__(
        self,
        name: str,
        unet: UNet2DConditionModel,
        latents: Latents,
        prompts: Prompts,
        vae: AutoencoderKL,
        *,
        steps: int,
        learning_rate: float,
        reads: bool,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Initialise the optimizer and the EMA.

        Args:
            name: name of the phase.
            unet: UNet with the initial weights; trained in place.
            latents: latents of the drawings.
            prompts: text features of the prompts.
            vae: the autoencoder, for the image grids.
            steps: training steps.
            learning_rate: peak learning rate of matrices and convolution kernels.
            reads: whether a quarter of each batch is reconstruction rows.
            batch_size: rows per step.
            seed: seed of the batches.
            device: device of the training.
        """
        self.name, self.steps = name, steps
        self.recipe = {"steps": steps, "seed": seed, "learning_rate": learning_rate, "batch_size": batch_size}
        self.recipe |= {"ema_decay": EMA_DECAY, "empty_prompts": _EMPTY_PROMPTS, "reads": reads}
        self._num_read = batch_size // 4 if reads else 0
        self.unet = unet.to(device, memory_format=torch.channels_last).train().requires_grad_(True)
        self.ema = AveragedModel(self.unet, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self._latents, self._prompts, self._vae = latents, prompts, vae
        self._batch_size, self._seed, self._device = batch_size, seed, device
        self._diffusion = Diffusion(build_scheduler())
        self._optimizer = Muon(self.unet.parameters(), learning_rate, _REST_LEARNING_RATE)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            [learning_rate, _REST_LEARNING_RATE],
            total_steps=steps,
            pct_start=min(0.05, 100 / steps),
            cycle_momentum=False,
        )

    def state(self) -> dict[str, Any]:
        """Return the objects to checkpoint by name."""
        return {"unet": self.unet, "ema": self.ema, "optimizer": self._optimizer, "schedule": self._schedule}

    def step(self, index: int) -> dict[str, float]:
        """Train on batch `index`, and return the losses by kind of row."""
        rng = np.random.default_rng([self._seed, index])
        batch, concepts = draw(self._latents, self._batch_size, rng, self._diffusion, num_read=self._num_read)
        text = self._prompts.draw(concepts, rng, drop=_EMPTY_PROMPTS).to(self._device)
        target, prediction, _ = predict(self.unet, self._diffusion, batch.to(self._device), text)
        errors = (prediction - target).square().mean((1, 2, 3))
        loss = errors.mean()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.ema.update_parameters(self.unet)
        sizes = [batch.num_read, batch.num_last, self._batch_size - batch.num_read - batch.num_last]
        parts = zip(("from_h", "one_step", "noised"), errors.detach().split(sizes), strict=True)
        return {name: float(part.mean()) for name, part in parts if len(part)}

    @torch.inference_mode()
    def grid(self) -> Image.Image:
        """Return rows of drawings, their reconstructions from `h`, and samples of 1 and 25 steps for their prompts."""
        unet = self.ema.module.eval()
        latents, noise, text = shown(self._latents, self._prompts, self._device)
        empty = self._prompts.empty.to(self._device).expand(len(text), -1, -1)
        rebuilt = rebuild_from_h(unet, self._diffusion, latents, text)
        rows = [latents, rebuilt, *(sample(unet, noise, text, empty, steps) for steps in _GRID_STEPS)]
        return grid(self._vae.decode(torch.cat(rows)).sample, columns=len(latents))


@dataclass(frozen=True)
class Batch:
    """Reconstruction rows first, then rows of pure noise, then rows at random timesteps."""

    latents: torch.Tensor
    """Target latents (B, 4, 16, 16)."""
    noise: torch.Tensor
    """Noise (B, 4, 16, 16)."""
    timesteps: torch.Tensor
    """Timesteps of the encoder's input (B,)."""
    keep: torch.Tensor
    """Whether the decoder gets skip connections (B,)."""
    num_read: int
    """Number of reconstruction rows."""
    num_last: int
    """Number of rows of pure noise."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`."""
        return replace(
            self,
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            timesteps=self.timesteps.to(device),
            keep=self.keep.to(device),
        )


def draw(
    latents: Latents, size: int, rng: np.random.Generator, diffusion: Diffusion, *, num_read: int
) -> tuple[Batch, torch.Tensor]:
    """Return a random batch, of which a quarter is pure noise, and the concepts (B,) of its rows.

    Noise and drawings are coupled at all timesteps, so that a trajectory that starts at pure noise stays at the drawing
    that the first step shows.
    """
    num_last = size // 4
    chosen = torch.from_numpy(rng.integers(len(latents.values), size=size))
    concepts = latents.concepts[chosen]
    batch = compose(latents.values[chosen], num_read, num_last, rng, diffusion)
    chosen[num_read:] = latents.chosen_by(batch.noise[num_read:], concepts[num_read:])
    return replace(batch, latents=latents.values[chosen]), concepts


def compose(
    latents: torch.Tensor, num_read: int, num_last: int, rng: np.random.Generator, diffusion: Diffusion
) -> Batch:
    """Return a batch of latents (B, 4, 16, 16) with noise, timesteps and skips for its three kinds of rows."""
    size = len(latents)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    timesteps = torch.from_numpy(rng.integers(diffusion.num_timesteps, size=size))
    # Half of the reconstruction rows are at t = 0, like references.
    timesteps[:num_read] = torch.from_numpy(rng.integers(-_ALMOST_CLEAN, _ALMOST_CLEAN, size=num_read).clip(min=0))
    timesteps[num_read : num_read + num_last] = diffusion.last
    return Batch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator),
        timesteps=timesteps,
        keep=torch.from_numpy((rng.random(size) >= _DROPPED_SKIPS) | (np.arange(size) >= num_read)),
        num_read=num_read,
        num_last=num_last,
    )


def predict(
    unet: UNet2DConditionModel, diffusion: Diffusion, batch: Batch, text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return target and prediction of v (B, 4, 16, 16) for a batch, and its `h` (B, 192, 4, 4)."""
    target = diffusion.velocity(batch.latents, batch.noise, batch.timesteps)
    target[: batch.num_read] = -batch.latents[: batch.num_read]  # v at T
    noised = diffusion.add_noise(batch.latents, batch.noise, batch.timesteps)
    encoded = encode(unet, noised.contiguous(memory_format=torch.channels_last), batch.timesteps, text)
    return target, decode(unet, _lend(encoded, batch)), encoded.h


def _lend(encoded: EncoderOutput, batch: Batch) -> EncoderOutput:
    """Replace skips and timestep of reconstruction rows by those of pure-noise rows, or the skips by zeros."""
    if not batch.num_read:
        return encoded
    lenders = torch.arange(batch.num_read) % batch.num_last + batch.num_read
    rows = torch.cat([lenders, torch.arange(batch.num_read, len(batch.latents))]).to(batch.latents.device)
    keep = batch.keep.view(-1, 1, 1, 1)
    return replace(encoded, skips=tuple(skip[rows] * keep for skip in encoded.skips), temb=encoded.temb[rows])


@torch.inference_mode()
def rebuild_from_h(
    unet: UNet2DConditionModel, diffusion: Diffusion, latents: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """Reconstruct latents (B, 4, 16, 16) from their `h` at t = 0 alone, with zero skip connections."""
    encoded = encode(unet, latents, 0, text)
    at_last = encode(unet, torch.zeros_like(latents), diffusion.last, text)
    skips = tuple(torch.zeros_like(skip) for skip in encoded.skips)
    return -decode(unet, replace(encoded, skips=skips, temb=at_last.temb))


def shown(latents: Latents, prompts: Prompts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents, noise and text features of some drawings for an image grid."""
    noise = torch.randn(_NUM_SHOWN, *latents.values.shape[1:], generator=torch.Generator().manual_seed(0))
    concepts = torch.arange(0, len(latents.of_style), len(latents.of_style) // _NUM_SHOWN)[:_NUM_SHOWN]
    values = latents.values[latents.chosen_by(noise, concepts)]
    return values.to(device), noise.to(device), prompts.names(concepts).to(device)


@torch.inference_mode()
def sample(
    unet: UNet2DConditionModel,
    noise: torch.Tensor,
    text: torch.Tensor,
    empty: torch.Tensor,
    steps: int,
    guidance: float = 3.0,
) -> torch.Tensor:
    """Sample latents (B, 4, 16, 16) from `noise`, with classifier-free guidance if `steps` is more than 1.

    Args:
        unet: the UNet.
        noise: initial noise (B, 4, 16, 16).
        text: text features (B, L, D).
        empty: text features of the empty prompt (B, L, D).
        steps: number of denoising steps.
        guidance: guidance scale.
    """
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps, device=noise.device)
    latents: torch.Tensor = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = unet(scaled, timestep, text).sample
        if steps > 1:
            without = unet(scaled, timestep, empty).sample
            prediction = without + guidance * (prediction - without)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents
