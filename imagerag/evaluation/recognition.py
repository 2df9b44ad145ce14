"""Does a picture show what its prompt names? Judged by features that were trained on other pictures (`features`).

Two judges. The first knows no words: of 100 concepts, that one is recognised whose real drawings are the nearest. So
it can judge concepts that nothing was trained on. The second is a CLIP score: a linear map from the features into the
space of sentences, fitted to real drawings of concepts that are not held out, apart from the retriever's image tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imagerag.evaluation.features import Features

NUM_NAMES = 100
_RIDGE = 100.0

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Judge:
    """Real drawings, as features."""

    features: Features
    """(N, D), centred and of length one."""
    concepts: Ints
    """(N,)."""
    centre: Floats

    @classmethod
    def of(cls, features: Features, concepts: Ints) -> "Judge":
        """Make a judge of real drawings' features (N, D) and concepts (N,)."""
        centre = features.mean(0)
        return cls(_normalized(features - centre), concepts, centre)

    def recognised(
        self,
        features: Features,
        concepts: Ints,
        candidates: Sequence[int] | Ints,
        ignored: Ints | None = None,
        num_names: int = NUM_NAMES,
    ) -> npt.NDArray[np.bool_]:
        """Return for each picture (B,) whether its concept is the nearest of `num_names`, see `is_nearest`.

        Args:
            features: of the pictures (B, D).
            concepts: what they should show (B,).
            candidates: concepts that the others are drawn from.
            ignored: drawings of the judge's own that do not count for a picture (B, K), -1 for none: itself, where it
                is a real one, or what it may be a copy of.
            num_names: of which one is right.
        """
        similarities = _normalized(features - self.centre) @ self.features.T
        if ignored is not None:
            rows, columns = np.nonzero(ignored >= 0)
            similarities[rows, ignored[rows, columns]] = -np.inf
        return is_nearest(similarities, self.concepts, concepts, candidates, num_names)


def is_nearest(
    similarities: Floats, drawn: Ints, concepts: Ints, candidates: Sequence[int] | Ints, num_names: int
) -> npt.NDArray[np.bool_]:
    """Return for each picture (B,) whether a drawing of its own concept is nearer than any of `num_names - 1` others.

    Args:
        similarities: of pictures to drawings (B, N).
        drawn: what the drawings show (N,).
        concepts: what the pictures should show (B,), all of them among the candidates.
        candidates: concepts that the others are drawn from, for each picture anew.
    """
    pool = np.unique(candidates)
    best = np.stack([similarities[:, drawn == concept].max(1) for concept in pool], 1)
    rng = np.random.default_rng(0)
    found = np.empty(len(similarities), bool)
    for row, own in enumerate(np.searchsorted(pool, concepts)):
        others = rng.choice(np.delete(np.arange(len(pool)), own), num_names - 1, replace=False)
        found[row] = best[row, own] > best[row, others].max()
    return found


@dataclass(frozen=True)
class ClipJudge:
    """A linear map from pictures' features to sentences' features."""

    centre: Floats
    scale: Floats
    weights: Floats

    @classmethod
    def fit(cls, features: Features, sentences: Floats, ridge: float = _RIDGE) -> "ClipJudge":
        """Fit by ridge regression: features (N, D) of real drawings to features (N, E) of their names."""
        centre, scale = features.mean(0), features.std(0) + 1e-6
        inputs = (features - centre) / scale
        gram = inputs.T @ inputs + ridge * np.eye(inputs.shape[1], dtype=np.float32)
        weights = np.linalg.solve(gram, inputs.T @ (sentences - sentences.mean(0)))
        return cls(centre, scale, weights.astype(np.float32))

    def scores(self, features: Features, sentences: Floats) -> Floats:
        """Return the cosine (B,) of pictures (B, D) and their prompts (B, E)."""
        mapped = _normalized(((features - self.centre) / self.scale) @ self.weights)
        scores: Floats = (mapped * _normalized(sentences)).sum(1)
        return scores


def _normalized(values: Floats) -> Floats:
    normalized: Floats = values / np.linalg.norm(values, axis=1, keepdims=True)
    return normalized
