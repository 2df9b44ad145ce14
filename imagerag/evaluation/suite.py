"""All metrics of an evaluation, and why some were not measured."""

from collections.abc import Callable, Collection, Iterator
from functools import cache

import numpy as np

from imagerag.embedding.encoder import load_encoder
from imagerag.evaluation.clip import Aesthetics, Clip, ClipScore, Cmmd, Fid, check_evaluator
from imagerag.evaluation.config import EvaluateConfig, MetricName
from imagerag.evaluation.intervals import Estimate
from imagerag.evaluation.metrics import (
    Distance,
    Metric,
    NotMeasuredError,
    Pictures,
    Real,
    Recognised,
    TextScore,
    by_prompt,
    mean_of,
)
from imagerag.evaluation.prompts import Prompts
from imagerag.evaluation.results import MetricAbout, Score
from imagerag.evaluation.tifa import Tifa
from imagerag.retrieval.search import Retriever


class Suite:
    """The metrics of an evaluation, loaded once.

    Attributes:
        not_measured: the missing input of each metric that was not measured.
    """

    def __init__(self, config: EvaluateConfig, prompts: Prompts, real: Real, retriever: Retriever) -> None:
        """Load the available metrics.

        Raises:
            UserError: if a given file is invalid.
        """
        self._num_prompts = len(prompts.texts)
        self._metrics: list[Metric] = []
        self.not_measured: dict[str, str] = {}
        for name, make in _makers(config, prompts, real, retriever):
            if lacking := config.lacking(name):
                self.not_measured[name] = lacking
                continue
            try:
                self._metrics.append(make())
            except NotMeasuredError as error:
                self.not_measured[name] = str(error)

    @property
    def about(self) -> dict[MetricName, MetricAbout]:
        """Title and direction of each measured metric."""
        return {
            each.name: MetricAbout(title=each.title, larger_is_better=each.larger_is_better) for each in self._metrics
        }

    def measure(self, pictures: Pictures, only: Collection[MetricName] | None = None) -> dict[MetricName, Score]:
        """Measure the pictures of one way.

        A metric that can't be measured for one way is dropped for all.

        Args:
            pictures: pictures of one way.
            only: metrics to measure; None measures all.
        """
        scores = {}
        for metric in [each for each in self._metrics if only is None or each.name in only]:
            try:
                scores[metric.name] = self._score(metric, pictures)
            except NotMeasuredError as error:
                self.not_measured[metric.name] = str(error)
                self._metrics.remove(metric)
        return scores

    def _score(self, metric: Metric, pictures: Pictures) -> Score:
        value = metric.measure(pictures)
        if isinstance(value, Estimate):
            return Score(estimate=value)
        values = by_prompt(value, pictures.numbers, self._num_prompts)
        return Score(estimate=mean_of(values), by_prompt=tuple(None if np.isnan(v) else float(v) for v in values))


def _makers(
    config: EvaluateConfig, prompts: Prompts, real: Real, retriever: Retriever
) -> Iterator[tuple[MetricName, Callable[[], Metric]]]:
    files = config.files

    @cache
    def clip() -> Clip:
        check_evaluator(files.clip or "", retriever.encoder.id)
        return Clip(files.clip or "")

    yield "fid", lambda: Fid(real)
    yield "cmmd", lambda: Cmmd(real)
    yield "frechet", lambda: Distance("frechet", real)
    yield "kernel", lambda: Distance("kernel", real)
    yield "clip_score", lambda: ClipScore(clip(), prompts.texts)
    yield "aesthetics", lambda: Aesthetics(files.aesthetic_head or "", clip().dim)
    yield "tifa", lambda: Tifa(files.tifa_questions or "", prompts.texts)
    yield "recognised", lambda: Recognised(real)
    yield "recognised_second", lambda: Recognised(real, "recognised_second")

    def text_score() -> Metric:
        embeds = load_encoder(retriever.encoder.id).encode_texts(list(prompts.texts))
        return TextScore(retriever, prompts.texts, embeds)

    yield "text_score", text_score
