"""Hyperparameters: as options of a command line, and those of networks that are trained on drawings."""

import argparse
import math
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

R = TypeVar("R")


def parse(parser: argparse.ArgumentParser, recipe: type[R]) -> tuple[R, argparse.Namespace]:
    """Parse the command line with an option for each field of a recipe; return it and the other arguments."""
    names = []
    for field in fields(recipe):  # type: ignore[arg-type]
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default, help="default: %(default)s")
        names.append(field.name)
    arguments = parser.parse_args()
    values = {name: vars(arguments).pop(name) for name in names}
    return recipe(**values), arguments


@dataclass(frozen=True, kw_only=True)
class DrawingsRecipe:
    """Hyperparameters of a network that is trained on augmented drawings; a recipe gives the values."""

    seed: int = 0
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    degrees: float
    scale: float
    shift: float
    """Maximum shift as a share of the image's side."""
    jitter: float
    """Maximum relative change of brightness, contrast and saturation."""

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """Return the schedule of the learning rate: linear warm-up under a cosine decay."""
        warmup_steps = max(1, self.warmup_steps)  # with one, the first step has the peak rate already
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup_steps, (1 + math.cos(math.pi * step / self.steps)) / 2),
        )

    def augment(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Apply random shifts, scales, rotations, flips and colour jitter.

        Args:
            pixels: drawings on white, bytes (B, 3, H, W).
            generator: draws the augmentations.

        Returns:
            Augmented images (B, 3, H, W), -1 to 1.
        """
        size = len(pixels)

        def uniform(half_width: float) -> torch.Tensor:
            return (torch.rand(size, generator=generator) * 2 - 1) * half_width

        angle, zoom = uniform(math.radians(self.degrees)), 1 / (1 + uniform(self.scale))
        mirror = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
        rows = [zoom * angle.cos() * mirror, -zoom * angle.sin(), uniform(2 * self.shift)]
        rows += [zoom * angle.sin() * mirror, zoom * angle.cos(), uniform(2 * self.shift)]
        grid = F.affine_grid(torch.stack(rows, 1).view(size, 2, 3), list(pixels.shape), align_corners=False)
        ink = 1 - pixels / 255  # white is zero, which is what grid_sample pads with
        ink = F.grid_sample(ink, grid, align_corners=False)
        brightness, contrast, saturation = (1 + uniform(self.jitter).view(-1, 1, 1, 1) for _ in range(3))
        ink = ink * brightness
        ink = ink.mean((1, 2, 3), keepdim=True).lerp(ink, contrast)
        ink = ink.mean(1, keepdim=True).lerp(ink, saturation)
        return 1 - 2 * ink.clamp(0, 1)
