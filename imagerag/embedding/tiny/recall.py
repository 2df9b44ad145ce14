"""How well names find drawings that the image tower has never seen: recall at k, its chance level and its error."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from imagerag.corpus.sample import load_drawings
from imagerag.embedding.encoder import Encoder

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of queries with a right drawing among the first k, over all drawings of a split."""

    k: int
    value: float
    low: float
    """Lower end of the 95 % interval: bootstrap over queries."""
    high: float
    chance: float
    """What a random order of the drawings would reach."""


def measure_recall(encoder: Encoder, split: str, ks: Sequence[int] = (1, 5)) -> list[Recall]:
    """Ask for every concept of `split` by its name, over all drawings of `split` in all styles."""
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
