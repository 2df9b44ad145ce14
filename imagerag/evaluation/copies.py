"""Copies of references in generated pictures, and leakage of evaluation prompts into the training set."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from imagerag.artifacts import TrainingSet
from imagerag.embedding.encoder import to_rgb
from imagerag.evaluation.efficientnet import Features
from imagerag.evaluation.metrics import Pictures, Real, real_rows
from imagerag.evaluation.recognition import Floats, Ints
from imagerag.evaluation.results import Copies, Leakage
from imagerag.hspace.encode import open_images
from imagerag.retrieval.recall import to_numpy
from imagerag.retrieval.schema import Embeds
from imagerag.retrieval.search import Retriever
from imagerag.storage.hexadecimal import ID
from imagerag.storage.keyed_table import KeyedTable
from imagerag.storage.lance_table import batches_of, rows_with
from imagerag.storage.spool import MEMORY_ROWS

_QUANTILE = 0.999
_THUMBNAIL = 32
_NEAR_DUPLICATE = 4.0
"""Mean absolute difference of thumbnails (0 to 255) below which two pictures count as near duplicates. In the sample
corpus, some faces that differ only in their mouths are below it."""
_COMPARED = 2000
_BLOCK_ROWS = 1024
_BATCH_ROWS = 16_384


def measure_copies(pictures: Pictures, threshold: float | None) -> Copies | None:
    """Measure the similarity of pictures to their references, for references among the prompts' real pictures.

    Returns:
        None without a threshold, or if no picture has such a reference.
    """
    if threshold is None:
        return None
    shown = pictures.real.places_of(pictures.made.references())
    rows = np.nonzero((shown >= 0).any(1))[0]
    if len(rows) == 0:
        return None
    of_real = pictures.real.features("thumbnails")
    real, own = _centred(of_real, of_real), _centred(pictures.made.features("thumbnails")[rows], of_real)
    nearest = np.full(len(rows), -1.0)
    for places in shown[rows].T:
        nearest = np.where(places >= 0, np.maximum(nearest, (own * real[places]).sum(1)), nearest)
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
    """Return the 99.9 % quantile of similarities between different real pictures, or None with fewer than two.

    Of more than 2,000 pictures, a random sample of as many is compared.
    """
    if len(real) < 2:
        return None
    own = real.features("thumbnails")
    features = _centred(np.random.default_rng(0).permutation(own)[:_COMPARED] if len(own) > _COMPARED else own, own)
    similarities = (features @ features.T)[np.triu_indices(len(features), 1)]
    different = similarities[similarities < 1 - 1e-4]
    return float(np.quantile(different, _QUANTILE)) if len(different) else None


def measure_leakage(retriever: Retriever, prompts: Sequence[str], training_set: TrainingSet) -> Leakage:
    """Count prompts and real pictures of the evaluation that were also used in training.

    The real pictures are compared with all others that were learnt from, batch by batch.
    """
    asked = pa.array(prompts, pa.string())
    learnt, num_prompts_learnt = _learnt(training_set, asked)
    own = real_rows(retriever, prompts)
    rows = rows_with(retriever.dataset, "id", own["id"], ["id", "image_sha256", "image_embed"])
    rows = rows.take(pc.index_in(own["id"], value_set=rows["id"]))
    nearest, learnt_images, first = _Nearest(to_numpy(rows["image_embed"])), set[bytes](), 0
    for batch in retriever.batches(["id", "caption", "image_sha256", "image_embed"], _BATCH_ROWS):
        is_own = pc.is_in(pc.utf8_trim_whitespace(batch["caption"]), asked)
        places = pc.indices_nonzero(pc.and_not(pc.is_in(batch["id"], learnt), is_own))
        others = batch.take(places)
        nearest.add(to_numpy(others["image_embed"]), places.to_numpy() + first)
        hashes = others["image_sha256"]
        learnt_images |= set(hashes.filter(pc.is_in(hashes, rows["image_sha256"])).to_pylist())
        first += batch.num_rows
    return Leakage(
        num_prompts_in_index=len(own["prompt"].unique()),
        num_prompts_learnt=num_prompts_learnt,
        num_images=own.num_rows,
        num_images_learnt=sum(sha256 in learnt_images for sha256 in rows["image_sha256"].to_pylist()),
        num_near_duplicates=_count_near(retriever, own["id"], nearest.rows),
    )


def _learnt(training_set: TrainingSet, prompts: pa.Array) -> tuple[pa.ChunkedArray, int]:
    """Return the ids of the examples that were learnt from, and the number of `prompts` that were."""
    ids, found = [], set()
    examples = KeyedTable.at(training_set.references_uri).dataset()
    for batch in batches_of(examples, ["id", "prompt", "is_held_out"], MEMORY_ROWS):
        rows = batch.filter(pc.invert(batch["is_held_out"]))
        ids += rows["id"].chunks
        captions = pc.utf8_trim_whitespace(rows["prompt"])
        found |= set(captions.filter(pc.is_in(captions, prompts)).to_pylist())
    return pa.chunked_array(ids, ID), len(found)


class _Nearest:
    """The most similar of all rows that were added, for each of some pictures."""

    def __init__(self, embeds: Embeds) -> None:
        self._embeds = embeds
        self._best = np.full(len(embeds), -np.inf, np.float32)
        self.rows = np.full(len(embeds), -1)

    def add(self, embeds: Embeds, rows: Ints) -> None:
        """Compare with embeddings (N, D) of rows (N,)."""
        if not len(rows):
            return
        for start in range(0, len(self._embeds), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            similarities = self._embeds[block] @ embeds.T
            best = similarities.max(1)
            is_nearer = best > self._best[block]
            self._best[block] = np.where(is_nearer, best, self._best[block])
            self.rows[block] = np.where(is_nearer, rows[similarities.argmax(1)], self.rows[block])


def _count_near(retriever: Retriever, own: pa.ChunkedArray, nearest: Ints) -> int:
    """Count pictures whose thumbnail nearly equals that of the most similar training picture by embedding."""
    compared = np.flatnonzero(nearest >= 0)
    count = 0
    for part in np.split(compared, range(_BLOCK_ROWS, len(compared), _BLOCK_ROWS)):
        images = rows_with(retriever.dataset, "id", own.take(part), ["id", "image"])
        mine = images["image"].take(pc.index_in(own.take(part), value_set=images["id"]))
        theirs = retriever.take(nearest[part], ["image"])["image"]
        pairs = zip(open_images(mine.to_pylist()), open_images(theirs.to_pylist()), strict=True)
        count += sum(np.abs(_thumbnail(one) - _thumbnail(other)).mean() < _NEAR_DUPLICATE for one, other in pairs)
    return int(count)


def _thumbnail(image: Image.Image) -> Floats:
    return np.asarray(to_rgb(image).resize((_THUMBNAIL, _THUMBNAIL)), np.float32)


def _centred(features: Features, real: Features) -> Floats:
    centred = features - real.mean(0)
    unit: Floats = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit
