"""Copies of references in generated pictures, and leakage of evaluation prompts into the training set."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from imagerag.artifacts import TrainingSet
from imagerag.embedding.encoder import to_rgb
from imagerag.evaluation.efficientnet import Features
from imagerag.evaluation.metrics import Pictures, Real
from imagerag.evaluation.recognition import Floats, Ints
from imagerag.evaluation.results import Copies, Leakage
from imagerag.hspace.encode import open_images
from imagerag.retrieval.recall import to_numpy
from imagerag.retrieval.schema import Embeds
from imagerag.retrieval.search import Retriever
from imagerag.storage.keyed_table import KeyedTable

_QUANTILE = 0.999
_THUMBNAIL = 32
_NEAR_DUPLICATE = 4.0
"""Mean absolute difference of thumbnails (0 to 255) below which two pictures count as near duplicates. In the sample
corpus, some faces that differ only in their mouths are below it."""
_BLOCK_ROWS = 1024


def measure_copies(pictures: Pictures, threshold: float | None) -> Copies | None:
    """Measure the similarity of pictures to their references, for references among the prompts' real pictures.

    Returns:
        None without a threshold, or if no picture has such a reference.
    """
    if threshold is None:
        return None
    real, shown = _centred(pictures.real.features, pictures.real.features), pictures.shown
    rows = np.nonzero((shown >= 0).any(1))[0]
    if len(rows) == 0:
        return None
    own = _centred(pictures.features[rows], pictures.real.features)
    similarities = np.einsum("nd,nkd->nk", own, real[shown[rows]])
    nearest = np.where(shown[rows] >= 0, similarities, -1).max(1)
    by_picture: list[float | None] = [None] * len(shown)
    for row, similarity in zip(rows, nearest.tolist(), strict=True):
        by_picture[row] = similarity
    return Copies(
        similarity=float(nearest.mean()),
        threshold=threshold,
        share=float((nearest > threshold).mean()),
        by_picture=tuple(by_picture),
    )


def threshold_of(real: Real) -> float | None:
    """Return the 99.9 % quantile of similarities between different real pictures, or None with fewer than two."""
    if len(real.ids) < 2:
        return None
    features = _centred(real.features, real.features)
    similarities = (features @ features.T)[np.triu_indices(len(features), 1)]
    different = similarities[similarities < 1 - 1e-4]
    return float(np.quantile(different, _QUANTILE)) if len(different) else None


def measure_leakage(retriever: Retriever, prompts: tuple[str, ...], training_set: TrainingSet) -> Leakage:
    """Count prompts and real pictures of the evaluation that were also used in training."""
    examples = KeyedTable.at(training_set.references_uri).dataset().to_table(columns=["id", "prompt", "is_held_out"])
    learnt_rows = examples.filter(np.logical_not(examples["is_held_out"].to_numpy()))
    learnt = {prompt.strip() for prompt in learnt_rows["prompt"].to_pylist()}
    rows = retriever.read(["id", "caption", "image_sha256", "image_embed"])
    captions = np.array([caption.strip() for caption in rows["caption"].to_pylist()])
    is_own = np.isin(captions, prompts)
    is_learnt = pc.is_in(rows["id"], learnt_rows["id"]).to_numpy() & ~is_own
    embeds = to_numpy(rows["image_embed"])
    own, others = (rows["image_sha256"].filter(pa.array(mask)) for mask in (is_own, is_learnt))
    return Leakage(
        num_prompts_in_index=len(set(prompts) & set(captions)),
        num_prompts_learnt=len(set(prompts) & learnt),
        num_images=int(is_own.sum()),
        num_images_learnt=int(pc.is_in(own, others).to_numpy().sum()),
        num_near_duplicates=_count_near(retriever, np.nonzero(is_own)[0], np.nonzero(is_learnt)[0], embeds),
    )


def _count_near(retriever: Retriever, own: Ints, learnt: Ints, embeds: Embeds) -> int:
    """Count pictures whose thumbnail nearly equals that of the most similar training picture by embedding."""
    if len(own) == 0 or len(learnt) == 0:
        return 0
    parts = np.split(embeds[own], range(_BLOCK_ROWS, len(own), _BLOCK_ROWS))
    nearest = np.concatenate([(part @ embeds[learnt].T).argmax(1) for part in parts])
    thumbnails = [
        np.stack([_thumbnail(image) for image in open_images(retriever.take(rows, ["image"])["image"].to_pylist())])
        for rows in (own, learnt[nearest])
    ]
    return int((np.abs(thumbnails[0] - thumbnails[1]).mean((1, 2, 3)) < _NEAR_DUPLICATE).sum())


def _thumbnail(image: Image.Image) -> Floats:
    return np.asarray(to_rgb(image).resize((_THUMBNAIL, _THUMBNAIL)), np.float32)


def _centred(features: Features, real: Features) -> Floats:
    centred = features - real.mean(0)
    unit: Floats = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit
