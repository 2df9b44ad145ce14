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
import torch
from PIL import Image

from imagerag.embedding.encoder import to_rgb
from imagerag.evaluation.features import Features, load_feature_network
from imagerag.evaluation.recognition import ClipJudge
from imagerag.hspace.features import open_images
from imagerag.retrieval.schema import Embeds
from imagerag.retrieval.search import Retriever

_NUM_ROWS = 2000
_RIDGE = 3000.0
"""Of 100 to 30,000, the best at telling the captions of 1,000 other drawings of the sample corpus from wrong ones (AUC
0.94)."""
_SIDE = 128
_BATCH_SIZE = 64


class Scorer:
    """Fitted to one index; `Scorer.of` does it."""

    def __init__(self, judge: ClipJudge) -> None:
        self._judge = judge

    @classmethod
    def of(cls, retriever: Retriever, cache: Path) -> "Scorer":
        """Fit to a sample of the index's rows, always the same, or read from a file what was fitted before."""
        if not cache.exists():
            images, embeds = retriever.sample(_NUM_ROWS)
            fitted = ClipJudge.fit(_features(open_images(images)), embeds, _RIDGE)
            cache.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=cache.parent, suffix=".partial", delete=False) as file:
                np.savez(file, **asdict(fitted))
            Path(file.name).replace(cache)
        with np.load(cache, allow_pickle=False) as arrays:
            return cls(ClipJudge(**arrays))

    def scores(self, pictures: Sequence[Image.Image], embeds: Embeds) -> list[float]:
        """Return the cosine of each picture and its text's embedding (N, D), -1 to 1."""
        scores: list[float] = self._judge.scores(_features(pictures), embeds).tolist()
        return scores


def _features(pictures: Sequence[Image.Image]) -> Features:
    network = load_feature_network()
    batches = (pictures[start : start + _BATCH_SIZE] for start in range(0, len(pictures), _BATCH_SIZE))
    return network(torch.stack([_to_tensor(picture) for picture in batch]) for batch in batches)


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    pixels = np.asarray(to_rgb(picture).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)
