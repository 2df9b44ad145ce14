"""Many pictures of many prompts, each known by its prompt and its seed."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from PIL import Image

from imagerag.generation.pipeline import ImageRAGTurboPipeline


@dataclass(frozen=True)
class Generated:
    """One picture."""

    prompt: str
    seed: int
    image: Image.Image


def generate(
    pipeline: ImageRAGTurboPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int = 8,
) -> Iterator[Generated]:
    """Yield a picture for each prompt and seed, prompt by prompt. A seed's noise is the same for every prompt."""
    wanted = list(product(prompts, seeds))
    for start in range(0, len(wanted), batch_size):
        group = wanted[start : start + batch_size]
        images = pipeline(
            [prompt for prompt, _ in group],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for _, seed in group],
        ).images
        for (prompt, seed), image in zip(group, images, strict=True):
            yield Generated(prompt, seed, image)


def file_name(number: int, generated: Generated) -> str:
    """Return a name that sorts by `number` and says what is in the file."""
    words = re.sub(r"[^a-z0-9]+", "-", generated.prompt.lower())[:48].strip("-")
    return f"{number:04d}-{words}-seed{generated.seed}.png"
