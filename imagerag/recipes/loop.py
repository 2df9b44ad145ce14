"""A single-process training loop that can be killed at any moment and resumes from its last checkpoint."""

import io
import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from tqdm import tqdm

from imagerag.storage.files import write_file
from imagerag.training.tracking import Tracker


class Phase(Protocol):
    """The training of one model."""

    name: str
    steps: int
    recipe: dict[str, Any]
    """Hyperparameters; a checkpoint with a different recipe is not resumed."""

    def state(self) -> dict[str, Any]:
        """Return the objects to checkpoint (with a `state_dict`) by name."""

    def step(self, index: int) -> dict[str, float]:
        """Train on batch `index`, which is determined by its index alone, and return the losses."""

    def grid(self) -> Image.Image:
        """Return an image grid of the model's current output."""


CHECKPOINT_SUFFIX = ".checkpoint"
_GRIDS = 10
"""Number of image grids logged over a whole training."""


def run(phase: Phase, folder: Path, tracker: Tracker, *, checkpoint_every_s: float = 60.0) -> None:
    """Train `phase` to its end, resuming from a checkpoint with the same recipe in `folder`.

    Args:
        phase: the training.
        folder: folder of the checkpoint.
        tracker: receives losses and image grids.
        checkpoint_every_s: seconds between checkpoints.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    path = folder / f"{phase.name}{CHECKPOINT_SUFFIX}"
    first = _resume(path, phase)
    saved = time.monotonic()
    with tqdm(range(first, phase.steps), desc=phase.name, initial=first, total=phase.steps, mininterval=10) as bar:
        for index in bar:
            losses = phase.step(index)
            if not all(math.isfinite(value) for value in losses.values()):
                raise FloatingPointError(f"step {index} of {phase.name}: {losses} with {phase.recipe}")
            done = index + 1
            if done % 25 == 0 or done == phase.steps:
                bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
                tracker.metrics({f"{phase.name}/{name}": value for name, value in losses.items()}, done)
            if done % max(1, phase.steps // _GRIDS) == 0 or done == phase.steps:
                tracker.image(f"{phase.name}/{done:06d}.png", phase.grid())
            if time.monotonic() - saved > checkpoint_every_s or done == phase.steps:
                _save(path, phase, done)
                saved = time.monotonic()


def start_from(phase: Phase, checkpoint: Path) -> None:
    """Initialise a phase from another run's checkpoint, except for the learning rate schedule.

    Besides the weights, this keeps the trained discriminator: the adversarial loss of an untrained one is misleading.
    """
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")["state"]
    for name, part in phase.state().items():
        if name != "schedule":
            part.load_state_dict(state[name])


def _save(path: Path, phase: Phase, done: int) -> None:
    state = {name: part.state_dict() for name, part in phase.state().items()}
    buffer = io.BytesIO()
    torch.save({"recipe": phase.recipe, "done": done, "state": state}, buffer)
    write_file(str(path), buffer.getvalue())


def _resume(path: Path, phase: Phase) -> int:
    if not path.exists():
        return 0
    checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    if checkpoint["recipe"] != phase.recipe:
        return 0
    for name, part in phase.state().items():
        part.load_state_dict(checkpoint["state"][name])
    return int(checkpoint["done"])
