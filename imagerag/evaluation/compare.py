"""What references do for a prompt: the same noise with and without them, side by side (paper, Sec. 3.2 and Fig. 5)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from imagerag.evaluation.scorer import Scorer
from imagerag.generation.pipeline import ImageRAGTurboOutput, ImageRAGTurboPipeline
from imagerag.generation.references import Reference

ORACLE_WS = tuple(number / 10 for number in range(1, 10))
TEACHER_STEPS = 25
TEACHER_GUIDANCE = {"tiny-teacher": 3.0}
_PAPERS_GUIDANCE = 7.5


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture of a prompt."""

    title: str
    image: Image.Image
    score: float
    """By `Scorer`; NaN where it was not asked."""
    seconds: float
    """Of the whole call that made it, retrieval included. The oracle's is that of all its tries."""
    references: tuple[Reference, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt, made in every way from the same noise."""

    prompt: str
    cells: tuple[Cell, ...]


class Comparer:
    """Makes comparisons with one base model and one index."""

    def __init__(
        self,
        pipeline: ImageRAGTurboPipeline,
        teacher: ImageRAGTurboPipeline | None,
        scorer: Scorer,
        *,
        seed: int,
        scale: float | None = None,
        models: Mapping[str, ImageRAGTurboPipeline] = MappingProxyType({}),
    ) -> None:
        """Take what pictures are made with.

        Args:
            pipeline: with an index.
            teacher: the multi-step model.
            scorer: of the pictures.
            seed: of the noise.
            scale: of the adapter; by default its own.
            models: by title, each with its own adapter and index; with some, the pipeline's own adapter has no column.
        """
        self._models = models
        self._pipeline, self._teacher, self._scorer, self._seed, self._scale = pipeline, teacher, scorer, seed, scale

    def compare(self, prompts: Sequence[str]) -> Iterator[Comparison]:
        """Yield a comparison of each prompt."""
        self._call(self._pipeline, prompts[0])  # what is loaded by the first call is not a picture's time
        for prompt in prompts:
            yield Comparison(prompt=prompt, cells=tuple(self._cells(prompt)))

    def _cells(self, prompt: str) -> Iterator[Cell]:
        pipeline = self._pipeline
        yield self._cell("base", pipeline, prompt, fusion="none")
        yield self._cell(f"slerp, w = {pipeline.config.slerp_w}", pipeline, prompt, fusion="slerp")
        yield self._oracle(prompt)
        for title, model in self._models.items():
            yield self._cell(title, model, prompt)
        if pipeline.adapter is not None and not self._models:
            title = "adapter" if self._scale is None else f"adapter, scale = {self._scale:g}"
            yield self._cell(title, pipeline, prompt, fusion="adapter", adapter_scale=self._scale)
        if self._teacher is not None:
            guidance = TEACHER_GUIDANCE.get(self._teacher.config.base_id, _PAPERS_GUIDANCE)
            yield self._cell(
                f"teacher, {TEACHER_STEPS} steps",
                self._teacher,
                prompt,
                fusion="none",
                num_inference_steps=TEACHER_STEPS,
                guidance_scale=guidance,
            )

    def _oracle(self, prompt: str) -> Cell:
        """Choose w by the score of what it makes, which nobody can know before: a bound, not a method."""
        tries = [self._cell("", self._pipeline, prompt, fusion="slerp", w=w) for w in ORACLE_WS]
        best = max(range(len(tries)), key=lambda index: tries[index].score)
        return Cell(
            title="oracle: best w",
            image=tries[best].image,
            score=tries[best].score,
            seconds=sum(each.seconds for each in tries),
            references=tries[best].references,
            note=f"w = {ORACLE_WS[best]}, chosen by the score",
        )

    def _cell(self, title: str, pipeline: ImageRAGTurboPipeline, prompt: str, **arguments: Any) -> Cell:
        started = time.perf_counter()
        output = self._call(pipeline, prompt, **arguments)
        seconds = time.perf_counter() - started
        (image,), (references,) = output.images, output.references
        (score,) = self._scorer.scores([image], self._pipeline.encode_queries([prompt]))
        return Cell(title=title, image=image, score=score, seconds=seconds, references=references)

    def _call(self, pipeline: ImageRAGTurboPipeline, prompt: str, **arguments: Any) -> ImageRAGTurboOutput:
        generator = torch.Generator().manual_seed(self._seed)
        output: ImageRAGTurboOutput = pipeline(prompt, generator=generator, **arguments)
        return output
