"""Train the second judge's network: python -m imagerag.recipes.judge --help.

The loss is NT-Xent (arXiv 2002.05709): positive pairs are two augmented drawings of one concept in different styles.
The concepts are those of the splits `base` and `adapter`, in all styles; their names are not used. Held-out concepts
are used for evaluation only.
"""

import argparse
import json
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.embedded.judge import (
    DIM,
    FOLDER,
    MANIFEST_NAME,
    SIDE,
    WEIGHTS_NAME,
    ContrastiveNetwork,
    contrastive_features,
    load_contrastive_network,
)
from imagerag.embedded.sample import Drawing, load_drawings
from imagerag.evaluation.intervals import estimate
from imagerag.evaluation.recognition import Judge
from imagerag.recipes.recipe import DrawingsRecipe, parse
from imagerag.storage.digests import sha256_of

logger = logging.getLogger(__name__)

SPLITS = ("base", "adapter")


@dataclass(frozen=True, kw_only=True)
class Recipe(DrawingsRecipe):
    """Hyperparameters of the training."""

    steps: int = 400
    batch_size: int = 128
    """Concepts per step, with two drawings each."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 20
    temperature: float = 0.1
    projection_dim: int = 64
    degrees: float = 10.0
    scale: float = 0.2
    shift: float = 0.1
    jitter: float = 0.3


def batch(recipe: Recipe, concepts: Sequence[torch.Tensor], step: int) -> torch.Tensor:
    """Return augmented pictures (2, B, 3, 64, 64), -1 to 1: two drawings of each of B concepts.

    Args:
        recipe: batch size and strengths of the augmentations.
        concepts: the drawings of each concept, bytes (N >= 2, 3, 64, 64).
        step: number of the batch.
    """
    rng = np.random.default_rng([recipe.seed, step])
    chosen = rng.choice(len(concepts), min(recipe.batch_size, len(concepts)), replace=False)
    pairs = [concepts[c][rng.choice(len(concepts[c]), 2, replace=False)] for c in chosen]
    pixels = torch.stack(pairs, 1).flatten(0, 1)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    augmented: torch.Tensor = recipe.augment(pixels, generator).unflatten(0, (2, -1))
    return augmented


def contrastive_loss(projected: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the NT-Xent loss of projected features (2, B, D), with positive pairs along the first dimension."""
    size = projected.shape[1]
    values = F.normalize(projected, dim=-1).flatten(0, 1)
    similarities = (values @ values.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarities, torch.arange(2 * size).roll(size))


def train(recipe: Recipe, drawings: Sequence[Drawing]) -> ContrastiveNetwork:
    """Train the network; deterministic for the same recipe and drawings on the same kind of machine.

    Raises:
        RuntimeError: if the loss is not finite.
    """
    torch.manual_seed(recipe.seed)
    network = ContrastiveNetwork().train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, recipe.projection_dim))
    grouped: dict[str, list[torch.Tensor]] = defaultdict(list)
    for drawing in drawings:
        grouped[drawing.concept.codepoint].append(torch.from_numpy(drawing.pixels(SIDE)))
    concepts = [torch.stack(own) for _, own in sorted(grouped.items()) if len(own) > 1]
    optimizer = torch.optim.AdamW(
        [*network.parameters(), *head.parameters()], recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = recipe.schedule(optimizer)
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
    """Return the leave-one-out recognition of a split's drawings among 100 concepts, with its interval."""
    pixels = torch.stack([torch.from_numpy(drawing.pixels(SIDE)) for drawing in drawings])
    names = sorted({drawing.concept.codepoint for drawing in drawings})
    concepts = np.array([names.index(drawing.concept.codepoint) for drawing in drawings])
    features = contrastive_features([pixels / 127.5 - 1], network)
    own = np.flatnonzero([drawing.concept.split == split for drawing in drawings])
    judge = Judge.of(features, concepts)
    found = judge.recognised(features[own], concepts[own], concepts[own], ignored=own[:, None])
    return asdict(estimate(found))


def save(network: ContrastiveNetwork, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Write the weights in float16 and the manifest to `folder`, and return the manifest."""
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
    parser.add_argument("--out", type=Path, default=FOLDER, help="output folder (default: %(default)s)")
    recipe, arguments = parse(parser, Recipe)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    manifest = save(train(recipe, load_drawings(splits=SPLITS)), recipe, arguments.out)
    logger.info("%s", json.dumps(manifest["recognised_among_100"], indent=1))


if __name__ == "__main__":
    main()
