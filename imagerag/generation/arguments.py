"""Validation of the pipeline's call arguments, before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from imagerag.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_STEPS = 1000
MAX_PROMPT_CHARACTERS = 2000
"""Text encoders use at most the first 77 tokens; a much longer prompt is a mistake."""
_LEAST_SIDE = 8
_MAX_WEIGHT = 10.0


@dataclass(frozen=True)
class Given:
    """References that the caller chose, one list per prompt."""

    ids: list[list[str]] | None = None
    images: list[list[Image.Image]] | None = None
    captions: list[list[str]] | None = None

    @property
    def any(self) -> bool:
        """Whether the caller chose references."""
        return self.ids is not None or self.images is not None


def in_list(value: Any) -> list[Any]:
    """Return a sequence as a list, any other value as a list of one, and None as an empty list."""
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def check_output_type(output_type: str) -> None:
    """Check that an output type is supported.

    Raises:
        UserError: if it is not.
    """
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type is one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")


def count_prompts(prompt: str | Sequence[str] | None, embeds: torch.Tensor | None) -> int:
    """Return the number of prompts.

    Raises:
        UserError: if there are none, or one is not a string.
    """
    if prompt is None and embeds is None:
        raise UserError("a prompt, or prompt_embeds, says what to make a picture of; got neither")
    prompts = in_list(prompt)
    if prompt is not None and not prompts:
        raise UserError("at least one prompt is needed")
    for each in prompts:
        _check_text(each)
    return len(prompts) if embeds is None else len(embeds)


def _check_text(prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise UserError(f"a prompt is a text; got {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, as JSON's \ud83d, which tokenizers refuse
        raise UserError(f"a prompt is text in Unicode; at character {error.start}, {prompt!r} is not") from None


def check_prompts(prompts: Sequence[str]) -> None:
    """Check that there are prompts, and that none is blank or too long.

    Raises:
        UserError: if there are none, or one is blank or too long.
    """
    if not prompts:
        raise UserError("at least one prompt is needed")
    for prompt in prompts:
        _check_text(prompt)
        if not prompt.strip():
            raise UserError(f"a prompt says what to make a picture of; got {prompt!r}")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise UserError(
                f"a prompt has at most {MAX_PROMPT_CHARACTERS:,} characters; one has {len(prompt):,}: {prompt[:40]!r}…"
            )


def check_queries(size: int, query: str | Sequence[str] | None, given: Given) -> list[str]:
    """Return the search queries, one for each of `size` prompts; empty if pictures are given without queries.

    Raises:
        UserError: if queries are missing, or one is blank or too long.
    """
    queries = in_list(query)
    if not queries and given.images is not None:
        return []
    if not queries:
        raise UserError(
            "prompt_embeds can't be searched for: name by `query` what to search the index for, give reference_images, "
            "or use fusion 'none'"
        )
    if given.images is None:
        check_prompts(queries)
    queries = queries * size if len(queries) == 1 else queries
    if len(queries) != size:
        raise UserError(f"there is one query for all prompts, or one for each of the {size}; got {len(queries)}")
    return queries


def check_sampling(
    num_prompts: int, steps: int, images_per_prompt: int, generator: torch.Generator | list[torch.Generator] | None
) -> None:
    """Check the number of steps, of pictures per prompt, and of generators.

    Raises:
        UserError: if one is out of bounds.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise UserError(f"the number of steps must be between 1 and {MAX_STEPS}; got {steps}")
    if images_per_prompt < 1:
        raise UserError(f"at least 1 picture of a prompt can be made; got {images_per_prompt}")
    size = num_prompts * images_per_prompt
    if isinstance(generator, list) and len(generator) != size:
        raise UserError(f"a list of generators has one for each of the {size} pictures; got {len(generator)}")


def check_given(num_prompts: int, prompts: Sequence[str], ids: Any, images: Any, captions: Any) -> Given:
    """Return the references that the caller chose, one list per prompt.

    Raises:
        UserError: if they don't fit the prompts or each other.
    """
    if ids is not None and images is not None:
        raise UserError("references are given as reference_ids or as reference_images, not both")
    if images is None and captions is not None:
        raise UserError("reference_captions say what reference_images show; got captions alone")
    if ids is not None:
        return Given(ids=_per_prompt("reference_ids", ids, str, num_prompts))
    if images is None:
        return Given()
    pictures = _per_prompt("reference_images", images, Image.Image, num_prompts)
    if captions is not None:
        texts = _per_prompt("reference_captions", captions, str, num_prompts)
    elif prompts:
        texts = [[prompt] * len(own) for prompt, own in zip(prompts, pictures, strict=True)]
    else:
        raise UserError("with prompt_embeds, reference_captions have to say what reference_images show")
    for own, about in zip(pictures, texts, strict=True):
        if len(own) != len(about):
            raise UserError(
                f"each reference picture has one caption; got {len(about)} captions, {about[0]!r} …, for {len(own)} "
                "pictures"
            )
    given = Given(images=pictures, captions=texts)
    for image in (image for own in pictures for image in own):
        if min(image.size) < _LEAST_SIDE:
            raise UserError(f"a reference picture has at least {_LEAST_SIDE} pixels a side; one has {image.size}")
    return given


def check_weights(num_prompts: int, weights: Any) -> list[list[float]]:
    """Return the weights of references, one list per prompt.

    Raises:
        UserError: if they don't fit the prompts, or one is out of bounds.
    """
    lists = _per_prompt("reference_weights", weights, float | int, num_prompts)
    for weight in (weight for own in lists for weight in own):
        if not 0 <= weight <= _MAX_WEIGHT:
            raise UserError(f"a reference's weight must be between 0 and {_MAX_WEIGHT:g}; got {weight}")
    return lists


def check_masks(num_prompts: int, masks: Any) -> list[list[Image.Image]]:
    """Return the masks of references, one list per prompt.

    Raises:
        UserError: if they don't fit the prompts.
    """
    return _per_prompt("reference_masks", masks, Image.Image, num_prompts)


def _per_prompt(name: str, values: Any, kind: Any, num_prompts: int) -> list[list[Any]]:
    """Return one list per prompt, from a single value, a list for all prompts, or a list per prompt."""
    outer = in_list(values)
    if not outer:
        raise UserError(f"{name} is empty: leave it out to search the index, or use fusion 'none'")
    nested = all(isinstance(each, Sequence) and not isinstance(each, str) for each in outer)
    lists = [list(own) for own in outer] if nested else [outer] * num_prompts
    if len(lists) != num_prompts:
        raise UserError(f"{name} has one list for each of the {num_prompts} prompts; got {len(lists)}")
    wrong = next((value for own in lists for value in own if not isinstance(value, kind)), None)
    if wrong is not None or not all(lists):
        found = "an empty list" if wrong is None else f"{type(wrong).__module__}.{type(wrong).__name__}"
        what = {str: "text", Image.Image: "PIL image"}.get(kind, "number")
        raise UserError(f"{name} is a {what}, a list of them for all prompts, or such a list for each; got {found}")
    return lists
