"""Which scale a trained adapter is used with: chosen on held-out examples, and stored with it as its default.

Losses cannot choose it. They are what training made small, at a scale of 1, and they favour what is timid: of pictures
that might show the right thing and ones that show a mean of many things, they are the smaller for the mean.
"""

from collections.abc import Sequence

import numpy as np
import torch

from imagerag.training.config import ReferenceChoice
from imagerag.training.data import Ints, RagData
from imagerag.training.generator import Generator

SCALES = (0.75, 1.0, 1.25, 1.5, 2.0)


def choose_scale(
    generator: Generator, data: RagData, examples: Ints, choice: ReferenceChoice, *, batch_size: int
) -> float:
    """Return the scale by which most examples are identified, see `identified`; of those as good, the nearest to 1.

    Args:
        generator: with the weights to choose for.
        data: of the examples.
        examples: held out (N,).
        choice: the references that they are shown.
        batch_size: examples that are made at a time.
    """
    device = next(generator.parameters()).device
    made: dict[float, list[torch.Tensor]] = {scale: [] for scale in SCALES}
    real = []
    with torch.no_grad():
        for number, part in enumerate(np.array_split(examples, -(-len(examples) // batch_size))):
            batch = data.read(part, choice, np.random.default_rng([1, number])).to(device)
            real.append(batch.latents)
            for scale, own in made.items():
                own.append(generator(batch, scale))
    prompts = [data.prompts[example] for example in examples]
    return best_scale({scale: identified(torch.cat(own), torch.cat(real), prompts) for scale, own in made.items()})


def identified(made: torch.Tensor, real: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return for each example (N,) whether the nearest real latents are of its own prompt: 1 or 0.

    Args:
        made: latents (N, C, H, W).
        real: likewise, of the pictures that they should show.
        prompts: of the examples; several may share one.
    """
    nearest = torch.cdist(made.float().flatten(1), real.float().flatten(1)).argmin(1).tolist()
    return torch.tensor([float(prompts[near] == own) for near, own in zip(nearest, prompts, strict=True)])


def best_scale(found: dict[float, torch.Tensor]) -> float:
    """Return the scale nearest to 1 that is within two standard errors of the one with the highest mean.

    Args:
        found: a value (N,) of each example by scale. The error is that of the paired difference.
    """
    best = max(found.values(), key=lambda values: float(values.mean()))

    def is_as_good(values: torch.Tensor) -> bool:
        lost = best - values
        return bool(lost.mean() <= 2 * lost.std(correction=0) / len(lost) ** 0.5)

    return min((scale for scale, values in found.items() if is_as_good(values)), key=lambda scale: abs(scale - 1))
