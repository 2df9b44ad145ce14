"""What is measured of pictures, each metric with what it needs; one whose weights are missing is not measured.

Those here need nothing from a hub: EfficientNet-Lite0 comes with a package. The others are in `clip` and `tifa`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from imagerag.evaluation.config import MetricName
from imagerag.evaluation.contrastive import contrastive_features
from imagerag.evaluation.distances import frechet, measure_distances
from imagerag.evaluation.features import Features, features_of, to_batches
from imagerag.evaluation.intervals import Estimate, estimate, jackknifed
from imagerag.evaluation.pictures import Made
from imagerag.evaluation.recognition import NUM_NAMES, Floats, Judge
from imagerag.evaluation.scorer import NUM_ROWS, Scorer
from imagerag.generation.references import Reference
from imagerag.hspace.features import open_images
from imagerag.retrieval.recall import to_numpy
from imagerag.retrieval.schema import Embeds
from imagerag.retrieval.search import Retriever

_FEWEST_PICTURES = 100
_FEWEST_NAMES = 20
_MOST_REAL = 20_000
_LEAST_KNOWN = 0.1
"""Share of the real pictures that the second judge has to recognise."""
_MOST_ASKED = 500


@dataclass(frozen=True)
class Real:
    """The pictures of the index whose captions are prompts."""

    ids: list[str]
    images: list[Image.Image]
    prompts: npt.NDArray[np.int64]
    """Of each picture, the number of its prompt."""

    @cached_property
    def features(self) -> Features:
        """(N, 1280)."""
        return features_of(self.images)

    @cached_property
    def second_features(self) -> Features:
        """(N, 160), of the second judge."""
        return contrastive_features(to_batches(self.images))

    def places_of(self, references: Sequence[tuple[Reference, ...]]) -> npt.NDArray[np.int64]:
        """Return the places of references among these pictures (N, K); -1 for none and for others."""
        places = {id: place for place, id in enumerate(self.ids)}
        most = max((len(own) for own in references), default=0)
        found = np.full((len(references), max(most, 1)), -1)
        for row, own in enumerate(references):
            found[row, : len(own)] = [places.get(reference.id, -1) for reference in own]
        return found

    @classmethod
    def of(cls, retriever: Retriever, prompts: Sequence[str]) -> "Real":
        """Read them; of very many, the first."""
        captions = retriever.read(["caption"])["caption"].to_pylist()
        numbers = {prompt: number for number, prompt in enumerate(prompts)}
        rows = [row for row, caption in enumerate(captions) if caption.strip() in numbers][:_MOST_REAL]
        if not rows:
            return cls([], [], np.empty(0, np.int64))
        found = retriever.take(rows, ["id", "image"])
        own = np.array([numbers[captions[row].strip()] for row in rows])
        return cls(found["id"].to_pylist(), list(open_images(found["image"].to_pylist())), own)


@dataclass(frozen=True)
class Pictures:
    """The pictures of one way, as metrics see them."""

    made: Made
    prompts: tuple[str, ...]
    """Of each picture."""
    numbers: npt.NDArray[np.int64]
    """Of each picture, the number of its prompt."""
    real: Real
    left_out: npt.NDArray[np.int64]
    """The places among the real pictures of what any way was shown (N, K), -1 for none: they recognise no picture, so
    that a copy is worth no more than what it shows, and a way that is shown more loses nothing by that."""

    @cached_property
    def features(self) -> Features:
        """(N, 1280)."""
        return features_of(self.made.images)

    @cached_property
    def second_features(self) -> Features:
        """(N, 160), of the second judge."""
        return contrastive_features(to_batches(self.made.images))

    @cached_property
    def shown(self) -> npt.NDArray[np.int64]:
        """The places among the real pictures of what each was shown (N, K); -1 for none and for others."""
        return self.real.places_of(self.made.references)


Value = Floats | Estimate
"""One number for each picture, or one for all of them."""


class Metric(Protocol):
    """Something that can be measured."""

    name: MetricName
    title: str
    larger_is_better: bool

    def measure(self, pictures: Pictures) -> Value:
        """Measure pictures."""
        ...


class NotMeasuredError(Exception):
    """A metric lacks something; the message says what, and where it is looked for."""


class Recognised:
    """Is a picture's prompt the nearest of a hundred, by the real pictures that no way was shown?"""

    larger_is_better = True

    def __init__(self, real: Real, name: Literal["recognised", "recognised_second"] = "recognised") -> None:
        """Make a judge of real pictures.

        Args:
            name: which judge: EfficientNet-Lite0, or the second one, which knows drawings alone.

        Raises:
            NotMeasuredError: if too few prompts are captions of the index, or the second judge does not know its way
                about the index's pictures.
        """
        self.name: MetricName = name
        self._candidates = np.unique(real.prompts)
        if len(self._candidates) < _FEWEST_NAMES:
            raise NotMeasuredError(
                f"needs pictures in the index for at least {_FEWEST_NAMES} of the prompts, as their captions; there "
                f"are {len(self._candidates)}"
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
                f"knows drawings alone: of the index's own pictures it recognises {known:.2f} by the others of their "
                f"captions, and is asked from {_LEAST_KNOWN} on"
            )

    def measure(self, pictures: Pictures) -> Value:
        """Return 1 or 0 for each picture, and NaN where the index has none of its prompt that no way was shown."""
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
        """Return the share of real pictures that are recognised by the others of their prompts, of 500 at most."""
        several = np.flatnonzero(np.bincount(real.prompts)[real.prompts] > 1)
        some = np.random.default_rng(0).permutation(several)[:_MOST_ASKED]
        if len(some) == 0:
            return 0.0
        found = self._judge.recognised(
            real.second_features[some], real.prompts[some], self._candidates, some[:, None], self._num_names
        )
        return float(found.mean())


class TextScore:
    """The cosine of picture and prompt by EfficientNet, mapped to the index's texts on rows that are no prompts."""

    name: MetricName = "text_score"
    title = "text score"
    larger_is_better = True

    def __init__(self, retriever: Retriever, prompts: Sequence[str], embeds: Embeds) -> None:
        """Fit it. Args: embeds: of the prompts (P, D)."""
        captions = retriever.read(["caption"])["caption"].to_pylist()
        own = set(prompts)
        others = [row for row, caption in enumerate(captions) if caption.strip() not in own]
        if len(others) < _FEWEST_PICTURES:
            raise NotMeasuredError(f"needs {_FEWEST_PICTURES} rows of the index that are no prompts; got {len(others)}")
        chosen = np.sort(np.random.default_rng(0).permutation(others)[:NUM_ROWS])
        rows = retriever.take(chosen, ["image", "text_embed"])
        self._scorer = Scorer.fit(rows["image"].to_pylist(), to_numpy(rows["text_embed"]))
        self._embeds = embeds

    def measure(self, pictures: Pictures) -> Value:
        """Return a cosine for each picture."""
        return self._scorer.scores_of(pictures.features, self._embeds[pictures.numbers])


class Distance:
    """How far the pictures as a whole are from the index's, by EfficientNet's features."""

    larger_is_better = False

    def __init__(self, name: MetricName, real: Real) -> None:
        """Args: name: `frechet` or `kernel`."""
        self.name: MetricName = name
        self.title = {"frechet": "Fréchet distance", "kernel": "kernel distance, x 1,000"}[name]
        self._real = check_enough(real.features, "the index")

    def measure(self, pictures: Pictures) -> Value:
        """Return one number."""
        features = check_enough(pictures.features, "each way")
        if self.name == "frechet":
            return distance_of(pictures, features, partial(frechet, other=self._real))
        found = measure_distances(features, self._real)
        # Of subsets; that of all is narrower by the root of how many subsets they are.
        half = 1.96 * found.kernel_deviation * np.sqrt(_FEWEST_PICTURES / len(pictures.features))
        return Estimate(found.kernel, found.kernel - half, found.kernel + half, len(pictures.features))


def distance_of(pictures: Pictures, features: Features, distance: Callable[[Features], float]) -> Estimate:
    """Return a distance of all pictures' features (N, D) together, with an interval over their prompts.

    Raises:
        NotMeasuredError: if there is but one prompt.
    """
    if len(np.unique(pictures.numbers)) < 2:
        raise NotMeasuredError("needs at least two prompts; there is one")
    return jackknifed(distance, features, pictures.numbers)


def check_enough(features: Features, whose: str) -> Features:
    """Return features, of which there are enough for a distance."""
    if len(features) < _FEWEST_PICTURES:
        raise NotMeasuredError(
            f"needs {_FEWEST_PICTURES} pictures of {whose} for the prompts; there are {len(features)}"
        )
    return features


def by_prompt(value: Floats, numbers: npt.NDArray[np.int64], num_prompts: int) -> Floats:
    """Return the mean of each prompt's pictures (P,); NaN where nothing was measured."""
    counts = np.bincount(numbers, minlength=num_prompts)
    sums = np.bincount(numbers, weights=value, minlength=num_prompts)
    return sums / np.where(counts == 0, np.nan, counts)


def mean_of(values: Floats) -> Estimate:
    """Return the mean over prompts that were measured."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        raise NotMeasuredError(f"needs at least two prompts; {len(known)} could be measured")
    return estimate(known)
