"""Selection of a trained adapter's default scale on held-out examples.

Losses are not used for the selection: training minimised them at scale 1, and they favour blurred averages over sharp
pictures that may be wrong. The share of identified examples is used instead.
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
    """Return the scale nearest to 1 among those that are not significantly worse than the best.

    The criterion is the share of examples whose nearest real latents have the same prompt (`identified`).

    Args:
        generator: the generator, with the weights to export.
        data: data of the examples.
        examples: held-out examples (N,).
        choice: references of the examples.
        batch_size: examples per batch.
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
    prompts = data.prompts(examples)
    return best_scale({scale: identified(torch.cat(own), torch.cat(real), prompts) for scale, own in made.items()})


def identified(made: torch.Tensor, real: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Return 1 for each example (N,) whose nearest real latents have the same prompt, otherwise 0.

    Args:
        made: generated latents (N, C, H, W).
        real: real latents of the same examples (N, C, H, W).
        prompts: prompts of the examples (N,), not necessarily unique.
    """
    nearest = torch.cdist(made.float().flatten(1), real.float().flatten(1)).argmin(1).tolist()
    return torch.tensor([float(prompts[near] == own) for near, own in zip(nearest, prompts, strict=True)])


def best_scale(found: dict[float, torch.Tensor]) -> float:
    """Return the scale nearest to 1 within two standard errors of the best mean, by paired differences.

    Args:
        found: values of the examples (N,) by scale.
    """
    best = max(found.values(), key=lambda values: float(values.mean()))

    def is_as_good(values: torch.Tensor) -> bool:
        lost = best - values
        return bool(lost.mean() <= 2 * lost.std(correction=0) / len(lost) ** 0.5)

    return min((scale for scale, values in found.items() if is_as_good(values)), key=lambda scale: abs(scale - 1))
