"""Judges of whether a picture shows its prompt, on image features that are independent of all trained models.

`Judge` is a nearest-neighbour classifier: among 100 concepts, a picture is assigned to the one with the nearest real
drawing. It uses no text, so it also judges concepts that nothing was trained on. `ClipJudge` computes a CLIP score: a
linear map from image features to sentence embeddings, fitted on real drawings, independent of the retriever's image
tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imagerag.evaluation.efficientnet import Features

NUM_NAMES = 100
_RIDGE = 100.0
_BLOCK_ROWS = 1024

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Judge:
    """Nearest-neighbour classifier on the features of real drawings."""

    features: Features
    """Centred and L2-normalised features of the drawings (N, D)."""
    concepts: Ints
    """Concepts of the drawings (N,)."""
    centre: Floats
    """Mean feature (D,), subtracted before normalisation."""

    @classmethod
    def of(cls, features: Features, concepts: Ints) -> "Judge":
        """Return a judge for features (N, D) and concepts (N,) of real drawings."""
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
        """Return for each picture (B,) whether its concept is the nearest of `num_names` concepts.

        The picture's own concept competes with `num_names - 1` concepts, drawn at random from the candidates. The
        similarity of a concept is that of its nearest drawing.

        Args:
            features: features of the pictures (B, D).
            concepts: true concepts of the pictures (B,), all of them among the candidates.
            candidates: concepts from which the competitors are drawn.
            ignored: drawings to ignore for each picture (B, K), padded with -1: the picture itself, if it is real, or
                its references.
            num_names: number of competing concepts, including the true one.
        """
        rng, found = np.random.default_rng(0), [np.empty(0, bool)]
        for start in range(0, len(features), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            similarities = _normalized(features[block] - self.centre) @ self.features.T
            if ignored is not None:
                rows, columns = np.nonzero(ignored[block] >= 0)
                similarities[rows, ignored[block][rows, columns]] = -np.inf
            found.append(is_nearest(similarities, self.concepts, concepts[block], candidates, num_names, rng))
        return np.concatenate(found)


def is_nearest(
    similarities: Floats,
    drawn: Ints,
    concepts: Ints,
    candidates: Sequence[int] | Ints,
    num_names: int,
    rng: np.random.Generator | None = None,
) -> npt.NDArray[np.bool_]:
    """Return for each picture (B,) whether the nearest drawing among `num_names` concepts has its own concept.

    Args:
        similarities: similarities of pictures and drawings (B, N).
        drawn: concepts of the drawings (N,).
        concepts: true concepts of the pictures (B,), all of them among the candidates.
        candidates: concepts from which `num_names - 1` competitors are drawn, separately for each picture.
        num_names: number of competing concepts, including the true one.
        rng: draws the competitors; by default, a generator with the seed 0.
    """
    pool = np.unique(candidates)
    best = np.stack([similarities[:, drawn == concept].max(1) for concept in pool], 1)
    rng = rng or np.random.default_rng(0)
    found = np.empty(len(similarities), bool)
    for row, own in enumerate(np.searchsorted(pool, concepts)):
        others = rng.choice(np.delete(np.arange(len(pool)), own), num_names - 1, replace=False)
        found[row] = best[row, own] > best[row, others].max()
    return found


@dataclass(frozen=True)
class ClipJudge:
    """A linear map from image features to sentence embeddings."""

    centre: Floats
    scale: Floats
    weights: Floats

    @classmethod
    def fit(cls, features: Features, sentences: Floats, ridge: float = _RIDGE) -> "ClipJudge":
        """Fit by ridge regression from features (N, D) of real drawings to embeddings (N, E) of their names."""
        centre, scale = features.mean(0), features.std(0) + 1e-6
        inputs = (features - centre) / scale
        gram = inputs.T @ inputs + ridge * np.eye(inputs.shape[1], dtype=np.float32)
        weights = np.linalg.solve(gram, inputs.T @ (sentences - sentences.mean(0)))
        return cls(centre, scale, weights.astype(np.float32))

    def scores(self, features: Features, sentences: Floats) -> Floats:
        """Return the cosine similarities (B,) of picture features (B, D) and prompt embeddings (B, E)."""
        mapped = _normalized(((features - self.centre) / self.scale) @ self.weights)
        scores: Floats = (mapped * _normalized(sentences)).sum(1)
        return scores


def _normalized(values: Floats) -> Floats:
    normalized: Floats = values / np.linalg.norm(values, axis=1, keepdims=True)
    return normalized
