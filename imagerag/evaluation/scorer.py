"""Text-image similarity from an image network that is independent of generation and retrieval.

A linear map, fitted to the index's pictures and captions, projects EfficientNet-Lite0 features into the index's text
embedding space. It needs no weights from a hub and works for any corpus. Scores rank pictures within one corpus; they
are comparable neither across corpora nor with published CLIP scores.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from imagerag.evaluation.efficientnet import Features, features_of
from imagerag.evaluation.recognition import ClipJudge, Floats
from imagerag.hspace.encode import open_images
from imagerag.retrieval.schema import Embeds
from imagerag.retrieval.search import Retriever
from imagerag.storage.files import write_file

NUM_ROWS = 2000
"""Maximum number of rows to fit to."""
_RIDGE = 3000.0
"""Best value from 100 to 30,000 at telling right from wrong captions of 1,000 other drawings of the sample corpus (AUC
0.94)."""


class Scorer:
    """Text-image similarity fitted to one index."""

    def __init__(self, judge: ClipJudge) -> None:
        self._judge = judge

    @classmethod
    def fit(cls, images: Sequence[bytes], embeds: Embeds) -> "Scorer":
        """Fit to encoded pictures and their captions' embeddings (N, D)."""
        return cls(ClipJudge.fit(features_of(open_images(images)), embeds, _RIDGE))

    @classmethod
    def of(cls, retriever: Retriever, cache: Path) -> "Scorer":
        """Fit to a fixed sample of the index's rows, or load an earlier fit from the file `cache`."""
        if not cache.exists():
            fitted = cls.fit(*retriever.sample(NUM_ROWS))._judge
            buffer = io.BytesIO()
            np.savez(buffer, **asdict(fitted))
            write_file(str(cache), buffer.getvalue())
        with np.load(cache, allow_pickle=False) as arrays:
            return cls(ClipJudge(**arrays))

    def scores(self, pictures: Sequence[Image.Image], embeds: Embeds) -> list[float]:
        """Return the cosine similarity of each picture and its text embedding (N, D), -1 to 1."""
        scores: list[float] = self.scores_of(features_of(pictures), embeds).tolist()
        return scores

    def scores_of(self, features: Features, embeds: Embeds) -> Floats:
        """Return the cosine similarities (N,) of picture features (N, 1280) and text embeddings (N, D), -1 to 1."""
        return self._judge.scores(features, embeds)
