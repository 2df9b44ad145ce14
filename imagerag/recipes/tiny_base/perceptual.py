"""Fifth phase: the network of the perceptual loss on latents.

It is trained contrastively to match drawings with their names, on the `base` concepts only.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.recipes.tiny_base.latents import Latents
from imagerag.training.perceptual import LatentNetwork, augment

LEARNING_RATE = 2e-3
_BATCH_SIZE = 128
_TEMPERATURE = 0.07
_NOISE = 0.1


class PerceptualPhase:
    """Contrastive training of a `LatentNetwork` on drawings and names."""

    name = "perceptual"

    def __init__(self, latents: Latents, names: torch.Tensor, *, steps: int, seed: int, device: torch.device) -> None:
        """Initialise the network and its optimizer.

        Args:
            latents: latents of the drawings.
            names: L2-normalised text embeddings of the concepts' names (concepts, D).
            steps: training steps.
            seed: seed of weights and batches.
            device: device of the training.
        """
        torch.manual_seed(seed)
        self.steps = steps
        self.recipe = {"steps": steps, "seed": seed, "learning_rate": LEARNING_RATE, "batch_size": _BATCH_SIZE}
        self._latents, self._names, self._seed, self._device = latents, names.to(device), seed, device
        self.network = LatentNetwork(latents.values.shape[1], embed_dim=names.shape[1]).to(device).train()
        self._optimizer = torch.optim.AdamW(self.network.parameters(), LEARNING_RATE, weight_decay=5e-2)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._optimizer, LEARNING_RATE, total_steps=steps)

    def state(self) -> dict[str, Any]:
        """Return the objects to checkpoint by name."""
        return {"network": self.network, "optimizer": self._optimizer, "schedule": self._schedule}

    def step(self, index: int) -> dict[str, float]:
        """Train on batch `index`, and return the losses."""
        rng = np.random.default_rng([self._seed, index])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        concepts = rng.permutation(len(self._latents.of_style))[:_BATCH_SIZE]
        drawings = self._latents.of_style[concepts]
        chosen = [int(rng.choice(own[own >= 0])) for own in drawings.numpy()]
        latents = self._latents.values[chosen]
        latents = latents + _NOISE * torch.randn(latents.shape, generator=generator)
        latents = augment(torch.cat([latents, latents]), generator)[: len(latents)].to(self._device)
        seen, names = self.network(latents), self._names[concepts]
        logits = seen @ names.T / _TEMPERATURE
        loss = F.cross_entropy(logits, torch.arange(len(logits), device=self._device))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        found = (logits.argmax(1).cpu() == torch.arange(len(logits))).float().mean()
        return {"contrast": float(loss.detach()), "found": float(found)}

    def grid(self) -> Image.Image:
        """Return the distances between drawings of the first 64 concepts as a grey image; dark means similar."""
        with torch.inference_mode():
            first = self._latents.of_style[:64, 0].clamp(min=0)
            seen = self.network(self._latents.values[first].to(self._device)).cpu()
        grey = ((1 - seen @ seen.T).clamp(0, 1) * 255).byte().numpy()
        return Image.fromarray(grey).resize((256, 256), Image.Resampling.NEAREST)
