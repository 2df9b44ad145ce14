"""Training data of the embedded base model: drawings as pixels, and their prompts as text features."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from imagerag.base.text import TextConditioner
from imagerag.embedded.sample import STYLES, Concept, Drawing

_KEYWORD_PROMPTS = 3
_ENCODED_AT_ONCE = 256


@dataclass(frozen=True)
class Pictures:
    """Decoded drawings with concept and style."""

    pixels: torch.Tensor
    """RGB bytes (N, 3, 128, 128)."""
    concepts: torch.Tensor
    """Indices (N,) into `codepoints`."""
    styles: torch.Tensor
    """Indices (N,) into `imagerag.embedded.sample.STYLES`."""
    codepoints: tuple[str, ...]

    @classmethod
    def of(cls, drawings: Sequence[Drawing]) -> "Pictures":
        """Decode `drawings`, keeping their order."""
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
    """Return prompts for `concept`: its name alone, in a phrase, and with a keyword."""
    name = concept.name
    with_keyword = [f"{name}, {keyword}" for keyword in concept.keywords if keyword not in name][:_KEYWORD_PROMPTS]
    return (name, f"a {name}", f"a picture of a {name}", *with_keyword)


class Prompts:
    """Precomputed text features of all prompts of all concepts, and of the empty prompt."""

    def __init__(self, concepts: Sequence[Concept], conditioner: TextConditioner) -> None:
        texts = [prompts_of(concept) for concept in concepts]
        listed = ["", *(text for group in texts for text in group)]
        features = [
            conditioner.encode(listed[start : start + _ENCODED_AT_ONCE]).embeds.half()
            for start in range(0, len(listed), _ENCODED_AT_ONCE)
        ]
        self.empty = features[0][0].float()
        """Text features of the empty prompt (L, D)."""
        self._of_concept: dict[int, list[int]] = defaultdict(list)
        self._features = torch.cat(features)
        position = 1
        for number, group in enumerate(texts):
            self._of_concept[number] = list(range(position, position + len(group)))
            position += len(group)

    def names(self, concepts: torch.Tensor) -> torch.Tensor:
        """Return the text features (B, L, D) of the names of `concepts` (B,)."""
        return self._features[[self._of_concept[int(c)][0] for c in concepts]].float()

    def draw(self, concepts: torch.Tensor, rng: np.random.Generator, drop: float = 0.0) -> torch.Tensor:
        """Return the text features (B, L, D) of a random prompt per concept.

        Args:
            concepts: concepts (B,).
            rng: draws the prompts: the bare name with probability 1/2, otherwise one of the other prompts.
            drop: share of prompts that are replaced by the empty prompt, for classifier-free guidance.
        """
        chosen = []
        for concept in concepts:
            group = self._of_concept[int(concept)]
            alone = rng.random() < 0.5
            chosen.append(0 if rng.random() < drop else group[0] if alone else int(rng.choice(group[1:])))
        return self._features[chosen].float()
