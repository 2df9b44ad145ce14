"""What a call of the pipeline may be given, checked before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image

from imagerag.errors import UserError

T = TypeVar("T")

MAX_STEPS = 1000
MAX_PROMPT_CHARACTERS = 2000
"""Text encoders see the first 77 tokens at most; what is much longer is a mistake."""
_LEAST_SIDE = 8


@dataclass(frozen=True)
class Given:
    """References that the caller chose, one list for each prompt."""

    ids: list[list[str]] | None = None
    images: list[list[Image.Image]] | None = None
    captions: list[list[str]] | None = None

    @property
    def any(self) -> bool:
        """Whether there are some."""
        return self.ids is not None or self.images is not None


def check_prompts(prompts: Sequence[str]) -> None:
    """Make sure that there are prompts, and that each says something.

    Raises:
        UserError: if not.
    """
    if not prompts:
        raise UserError("at least one prompt is needed")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"a prompt says what to make a picture of; got {prompt!r}")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise UserError(
                f"a prompt has at most {MAX_PROMPT_CHARACTERS:,} characters; one has {len(prompt):,}: {prompt[:40]!r}…"
            )


def check_sampling(
    num_prompts: int, steps: int, images_per_prompt: int, generator: torch.Generator | list[torch.Generator] | None
) -> None:
    """Make sure that there is a step, a picture and a generator for each.

    Raises:
        UserError: if not.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise UserError(f"the number of steps must be between 1 and {MAX_STEPS}; got {steps}")
    if images_per_prompt < 1:
        raise UserError(f"at least 1 picture of a prompt can be made; got {images_per_prompt}")
    size = num_prompts * images_per_prompt
    if isinstance(generator, list) and len(generator) != size:
        raise UserError(f"a list of generators has one for each of the {size} pictures; got {len(generator)}")


def check_given(
    num_prompts: int,
    ids: Sequence[str] | Sequence[Sequence[str]] | None,
    images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None,
    captions: Sequence[str] | Sequence[Sequence[str]] | None,
) -> Given:
    """Return the references that the caller chose, as one list for each prompt.

    Raises:
        UserError: if they don't fit the prompts or each other.
    """
    if ids is not None and images is not None:
        raise UserError("references are given as reference_ids or as reference_images, not both")
    if (images is None) != (captions is None):
        raise UserError("reference_images and reference_captions belong together: one caption for each picture")
    if ids is not None:
        return Given(ids=_per_prompt("reference_ids", ids, str, num_prompts))
    if images is None or captions is None:
        return Given()
    given = Given(
        images=_per_prompt("reference_images", images, Image.Image, num_prompts),
        captions=_per_prompt("reference_captions", captions, str, num_prompts),
    )
    assert given.images is not None
    assert given.captions is not None
    if list(map(len, given.images)) != list(map(len, given.captions)):
        raise UserError(
            f"there is one caption for each reference picture; got {sum(map(len, given.captions))} captions for "
            f"{sum(map(len, given.images))} pictures"
        )
    for image in (image for own in given.images for image in own):
        if min(image.size) < _LEAST_SIDE:
            raise UserError(f"a reference picture has at least {_LEAST_SIDE} pixels a side; one has {image.size}")
    return given


def _per_prompt(name: str, values: Sequence[Any], kind: type[T], num_prompts: int) -> list[list[T]]:
    if len(values) == 0:
        raise UserError(f"{name} is empty: leave it out to search the index, or use fusion 'none'")
    nested = not isinstance(values[0], kind)
    lists = [list(own) for own in values] if nested else [list(values)] * num_prompts
    if len(lists) != num_prompts:
        raise UserError(f"{name} has one list for each of the {num_prompts} prompts; got {len(lists)}")
    if not all(isinstance(value, kind) for own in lists for value in own) or not all(lists):
        raise UserError(f"{name} is a list of {kind.__name__}, or one such list for each prompt")
    return lists
