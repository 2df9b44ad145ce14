"""Text-to-image recall at k on drawings of one split, with chance level and confidence interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from imagerag.embedded.sample import load_drawings
from imagerag.embedding.encoder import Encoder

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of queries with a matching drawing among the first k, over all drawings of a split."""

    k: int
    value: float
    low: float
    """Lower end of the 95 % confidence interval, by bootstrap over queries."""
    high: float
    """Upper end of the interval."""
    chance: float
    """Expected recall of a random ranking."""


def measure_recall(encoder: Encoder, split: str, ks: Sequence[int] = (1, 5)) -> list[Recall]:
    """Return the recall at each k for the names of all concepts of `split`, over its drawings in all styles."""
    drawings = load_drawings(splits=[split])
    names = sorted({drawing.concept.name for drawing in drawings})
    concepts = np.array([names.index(drawing.concept.name) for drawing in drawings])
    images = encoder.encode_images([drawing.image for drawing in drawings])
    nearest = concepts[np.argsort(-(encoder.encode_texts(names) @ images.T), axis=1, kind="stable")]
    hits = nearest == np.arange(len(names))[:, None]
    return [_recall(hits[:, :k].any(axis=1), k, np.bincount(concepts)) for k in ks]


def _recall(hit: np.ndarray, k: int, num_right: np.ndarray) -> Recall:
    resampled = np.random.default_rng(0).choice(hit, (_RESAMPLES, len(hit))).mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    total = int(num_right.sum())
    chance = np.mean([1 - comb(total - int(right), k) / comb(total, k) for right in num_right])
    return Recall(k=k, value=float(hit.mean()), low=float(low), high=float(high), chance=float(chance))
