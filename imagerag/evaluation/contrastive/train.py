"""Train the second judge's network: python -m imagerag.evaluation.contrastive.train --help.

Two drawings of one concept, in two styles, each moved and recoloured, are to be each other's nearest in a batch of
concepts (NT-Xent, arXiv 2002.05709). The concepts are those of the splits `base` and `adapter`, in all styles; names
are not read. Held-out concepts are only measured.
"""

import argparse
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.corpus.sample import Drawing, load_drawings
from imagerag.digests import sha256_of
from imagerag.embedding.tiny import train as encoder
from imagerag.evaluation.contrastive import (
    DIM,
    FOLDER,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    ContrastiveNetwork,
    contrastive_features,
    load_contrastive_network,
)
from imagerag.evaluation.intervals import estimate
from imagerag.evaluation.recognition import Judge

logger = logging.getLogger(__name__)

SPLITS = ("base", "adapter")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes the weights, beside the corpus."""

    seed: int = 0
    steps: int = 400
    batch_size: int = 128
    """Concepts, each drawn twice."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 20
    temperature: float = 0.1
    projection_dim: int = 64
    degrees: float = 10.0
    scale: float = 0.2
    shift: float = 0.1
    """Of the image's side."""
    jitter: float = 0.3
    """Of brightness, contrast and saturation."""


def batch(recipe: Recipe, concepts: Sequence[torch.Tensor], step: int) -> torch.Tensor:
    """Return pictures (2, B, 3, 64, 64), -1 to 1: two of each concept.

    Args:
        concepts: of each, the drawings (at least two, 3, 64, 64), bytes.
    """
    rng = np.random.default_rng([recipe.seed, step])
    chosen = rng.choice(len(concepts), min(recipe.batch_size, len(concepts)), replace=False)
    pairs = [concepts[c][rng.choice(len(concepts[c]), 2, replace=False)] for c in chosen]
    pixels = torch.stack(pairs, 1).flatten(0, 1)
    augmentation = encoder.Recipe(degrees=recipe.degrees, scale=recipe.scale, shift=recipe.shift, jitter=recipe.jitter)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    augmented: torch.Tensor = encoder.augment(pixels, augmentation, generator).unflatten(0, (2, -1))
    return augmented


def contrastive_loss(projected: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return NT-Xent of projected features (2, B, D): each is to find its concept's other drawing among all."""
    size = projected.shape[1]
    values = F.normalize(projected, dim=-1).flatten(0, 1)
    similarities = (values @ values.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarities, torch.arange(2 * size).roll(size))


def train(recipe: Recipe, drawings: Sequence[Drawing]) -> ContrastiveNetwork:
    """Return the trained network, the same for the same recipe and drawings on one kind of machine."""
    torch.manual_seed(recipe.seed)
    network = ContrastiveNetwork().train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, recipe.projection_dim))
    grouped: dict[str, list[torch.Tensor]] = defaultdict(list)
    for drawing in drawings:
        grouped[drawing.concept.codepoint].append(torch.from_numpy(drawing.pixels()))
    concepts = [torch.stack(own) for _, own in sorted(grouped.items()) if len(own) > 1]
    optimizer = torch.optim.AdamW(
        [*network.parameters(), *head.parameters()], recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / recipe.warmup_steps, (1 + math.cos(math.pi * step / recipe.steps)) / 2),
    )
    logger.info("%d concepts, %d steps", len(concepts), recipe.steps)
    started = time.perf_counter()
    for step in range(recipe.steps):
        pictures = batch(recipe, concepts, step)
        features = network(pictures.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        loss = contrastive_loss(head(features).unflatten(0, (2, -1)), recipe.temperature)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss of step {step} is {loss.item()} with {recipe}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 20 == 0:
            logger.info("step %d: loss %.3f, %.0f s", step + 1, loss.item(), time.perf_counter() - started)
    network.eval()
    return network


def recognised(network: ContrastiveNetwork, drawings: Sequence[Drawing], split: str) -> dict[str, float]:
    """Return how often a drawing of a split is recognised among 100 concepts, by all drawings but itself."""
    pixels = torch.stack([torch.from_numpy(drawing.pixels()) for drawing in drawings])
    names = sorted({drawing.concept.codepoint for drawing in drawings})
    concepts = np.array([names.index(drawing.concept.codepoint) for drawing in drawings])
    features = contrastive_features([pixels / 127.5 - 1], network)
    own = np.flatnonzero([drawing.concept.split == split for drawing in drawings])
    judge = Judge.of(features, concepts)
    found = judge.recognised(features[own], concepts[own], concepts[own], ignored=own[:, None])
    return asdict(estimate(found))


def save(network: ContrastiveNetwork, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Write weights, in float16, and manifest to `folder`, and return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    save_file(state, folder / WEIGHTS_NAME)
    drawings, kept = load_drawings(), load_contrastive_network(folder)
    manifest = {
        "weights_sha256": sha256_of(folder / WEIGHTS_NAME),
        "recipe": asdict(recipe),
        "splits": SPLITS,
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow")},
        "recognised_among_100": {split: recognised(kept, drawings, split) for split in (*SPLITS, "held_out")},
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the second judge's network on the sample corpus.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where weights and manifest go: %(default)s")
    for field in fields(Recipe):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default, help="%(default)s")
    arguments = vars(parser.parse_args())
    folder = arguments.pop("out")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe(**arguments)
    manifest = save(train(recipe, load_drawings(splits=SPLITS)), recipe, folder)
    logger.info("%s", json.dumps(manifest["recognised_among_100"], indent=1))


if __name__ == "__main__":
    main()
