"""What the embedded base model learns from: the drawings of one split as pixels, and their prompts as text features."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from imagerag.corpus.sample import STYLES, Concept, Drawing
from imagerag.generation.text import TextConditioner

_KEYWORD_PROMPTS = 3
_ENCODED_AT_ONCE = 256


@dataclass(frozen=True)
class Pictures:
    """Drawings, in the order in which they were given."""

    pixels: torch.Tensor
    """(N, 3, 64, 64), bytes."""
    concepts: torch.Tensor
    """(N,), an index into `codepoints`."""
    styles: torch.Tensor
    """(N,), an index into `imagerag.corpus.sample.STYLES`."""
    codepoints: tuple[str, ...]

    @classmethod
    def of(cls, drawings: Sequence[Drawing]) -> "Pictures":
        """Decode `drawings`."""
        codepoints = tuple(dict.fromkeys(drawing.concept.codepoint for drawing in drawings))
        numbers = {codepoint: number for number, codepoint in enumerate(codepoints)}
        styles = {style.name: number for number, style in enumerate(STYLES)}
        return cls(
            pixels=torch.stack([torch.from_numpy(drawing.pixels()) for drawing in drawings]),
            concepts=torch.tensor([numbers[drawing.concept.codepoint] for drawing in drawings]),
            styles=torch.tensor([styles[drawing.style.name] for drawing in drawings]),
            codepoints=codepoints,
        )


def prompts_of(concept: Concept) -> tuple[str, ...]:
    """Return what a person may call `concept`: its name alone, in a phrase, and with a keyword."""
    name = concept.name
    with_keyword = [f"{name}, {keyword}" for keyword in concept.keywords if keyword not in name][:_KEYWORD_PROMPTS]
    return (name, f"a {name}", f"a picture of a {name}", *with_keyword)


class Prompts:
    """The text features of every prompt of every concept, computed once, and of the empty prompt."""

    def __init__(self, concepts: Sequence[Concept], conditioner: TextConditioner) -> None:
        texts = [prompts_of(concept) for concept in concepts]
        listed = ["", *(text for group in texts for text in group)]
        features = [
            conditioner.encode(listed[start : start + _ENCODED_AT_ONCE]).embeds.half()
            for start in range(0, len(listed), _ENCODED_AT_ONCE)
        ]
        self.empty = features[0][0].float()
        """(L, D)."""
        self._of_concept: dict[int, list[int]] = defaultdict(list)
        self._features = torch.cat(features)
        position = 1
        for number, group in enumerate(texts):
            self._of_concept[number] = list(range(position, position + len(group)))
            position += len(group)

    def names(self, concepts: torch.Tensor) -> torch.Tensor:
        """Return the features (B, L, D) of the names of concepts (B,)."""
        return self._features[[self._of_concept[int(c)][0] for c in concepts]].float()

    def draw(self, concepts: torch.Tensor, rng: np.random.Generator, drop: float = 0.0) -> torch.Tensor:
        """Return the features (B, L, D) of a random prompt for each, the name as likely as all others together.

        Args:
            drop: share of prompts that are made empty, for classifier-free guidance.
        """
        chosen = []
        for concept in concepts:
            group = self._of_concept[int(concept)]
            alone = rng.random() < 0.5
            chosen.append(0 if rng.random() < drop else group[0] if alone else int(rng.choice(group[1:])))
        return self._features[chosen].float()
