"""How well a picture shows a text, by an image network that had no part in making or retrieving pictures.

EfficientNet-Lite0's features are mapped to the space of the index's text embeddings by a linear map, which is fitted to
the index's own pictures and captions. So it needs no weights from a hub and suits any corpus; it ranks pictures of one
corpus, and its scores can't be compared with another's, nor with published CLIP scores.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from PIL import Image

from imagerag.evaluation.features import Features, features_of
from imagerag.evaluation.recognition import ClipJudge, Floats
from imagerag.hspace.features import open_images
from imagerag.retrieval.schema import Embeds
from imagerag.retrieval.search import Retriever

NUM_ROWS = 2000
"""That it is fitted to."""
_RIDGE = 3000.0
"""Of 100 to 30,000, the best at telling the captions of 1,000 other drawings of the sample corpus from wrong ones (AUC
0.94)."""


class Scorer:
    """Fitted to one index; `Scorer.of` does it."""

    def __init__(self, judge: ClipJudge) -> None:
        self._judge = judge

    @classmethod
    def fit(cls, images: Sequence[bytes], embeds: Embeds) -> "Scorer":
        """Fit to encoded pictures and their captions' embeddings (N, D)."""
        return cls(ClipJudge.fit(features_of(open_images(images)), embeds, _RIDGE))

    @classmethod
    def of(cls, retriever: Retriever, cache: Path) -> "Scorer":
        """Fit to a sample of the index's rows, always the same, or read from a file what was fitted before."""
        if not cache.exists():
            fitted = cls.fit(*retriever.sample(NUM_ROWS))._judge
            cache.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=cache.parent, suffix=".partial", delete=False) as file:
                np.savez(file, **asdict(fitted))
            Path(file.name).replace(cache)
        with np.load(cache, allow_pickle=False) as arrays:
            return cls(ClipJudge(**arrays))

    def scores(self, pictures: Sequence[Image.Image], embeds: Embeds) -> list[float]:
        """Return the cosine of each picture and its text's embedding (N, D), -1 to 1."""
        scores: list[float] = self.scores_of(features_of(pictures), embeds).tolist()
        return scores

    def scores_of(self, features: Features, embeds: Embeds) -> Floats:
        """Return the same of pictures whose features (N, 1280) are known."""
        return self._judge.scores(features, embeds)
