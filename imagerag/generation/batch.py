"""Many pictures of many prompts, each known by its prompt and its seed."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from PIL import Image

from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.generation.references import Reference


@dataclass(frozen=True)
class Generated:
    """One picture."""

    prompt: str
    seed: int
    image: Image.Image
    references: tuple[Reference, ...]


def generate(
    pipeline: ImageRAGTurboPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 8,
    **arguments: Any,
) -> Iterator[Generated]:
    """Yield a picture for each prompt and seed, prompt by prompt. A seed's noise is the same for every prompt.

    Args:
        batch_size: pictures that are made at a time.
        arguments: of the pipeline's call.
    """
    wanted = list(product(prompts, seeds))
    for start in range(0, len(wanted), batch_size):
        group = wanted[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for _, seed in group]
        made = pipeline([prompt for prompt, _ in group], generator=generators, **arguments)
        for (prompt, seed), image, references in zip(group, made.images, made.references, strict=True):
            yield Generated(prompt, seed, image, references)


def file_name(number: int, generated: Generated) -> str:
    """Return a name that sorts by `number` and says what is in the file."""
    words = re.sub(r"[^a-z0-9]+", "-", generated.prompt.lower())[:48].strip("-")
    return f"{number:04d}-{words}-seed{generated.seed}.png"
