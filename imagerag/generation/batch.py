"""Batched generation of pictures, each identified by its prompt and seed."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from PIL import Image

from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.generation.references import Reference
from imagerag.generation.sheet import to_png
from imagerag.generation.xmp import to_xmp


@dataclass(frozen=True)
class Generated:
    """A generated picture with its prompt, seed and references."""

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
    """Yield a picture for each prompt and seed, in the order of prompts; a seed gives every prompt the same noise.

    Args:
        pipeline: the pipeline to call.
        prompts: prompts.
        seeds: seeds, used for every prompt.
        batch_size: number of pictures per call.
        arguments: further arguments of the pipeline's call.
    """
    wanted = list(product(prompts, seeds))
    for start in range(0, len(wanted), batch_size):
        yield from make(pipeline, wanted[start : start + batch_size], arguments)


def make(
    pipeline: ImageRAGTurboPipeline, wanted: Sequence[tuple[str, int]], arguments: Mapping[str, Any]
) -> list[Generated]:
    """Return the pictures of prompts with seeds, generated in one call."""
    generators = [torch.Generator().manual_seed(seed) for _, seed in wanted]
    if negative := arguments.get("negative_prompt"):  # diffusers needs one per prompt
        arguments = {**arguments, "negative_prompt": [negative] * len(wanted)}
    made = pipeline([prompt for prompt, _ in wanted], generator=generators, **arguments)
    return [
        Generated(prompt, seed, image, references)
        for (prompt, seed), image, references in zip(wanted, made.images, made.references, strict=True)
    ]


def labelled_png(generated: Generated, about: Mapping[str, Any]) -> bytes:
    """Return the picture as a PNG file with metadata.

    The text chunk `imagerag` is JSON of prompt, seed, references and `about`; the XMP packet says that the picture is
    generated.
    """
    own = {"prompt": generated.prompt, "seed": generated.seed, "references": list(map(asdict, generated.references))}
    return to_png(generated.image, json.dumps({**own, **about}), to_xmp(generated.references))


def file_name(number: int, generated: Generated) -> str:
    """Return a file name with the number first, then words of the prompt and the seed."""
    words = re.sub(r"[^a-z0-9]+", "-", generated.prompt.lower())[:48].strip("-")
    return f"{number:04d}-{words}-seed{generated.seed}.png"
