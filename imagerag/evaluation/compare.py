"""Side-by-side comparison of one prompt with and without references, from the same noise (paper, Sec. 3.2, Fig. 5)."""

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

ORACLE_WS = (-1.0, -0.75, -0.5, -0.25, *(number / 10 for number in range(11)))
"""All of slerp's range, so that neither the base model (1) nor the reference (0) is better than the best w."""
TEACHER_STEPS = 25
_TEACHER_GUIDANCE = {"tiny-teacher": 3.0}
_PAPERS_GUIDANCE = 7.5


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture of a prompt, made in one way."""

    title: str
    image: Image.Image
    score: float
    """`Scorer`'s score; NaN if the picture was not scored."""
    seconds: float
    """Duration of the whole pipeline call, including retrieval; for the oracle, the sum over all values of w."""
    references: tuple[Reference, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The pictures of one prompt, made in every way from the same noise."""

    prompt: str
    cells: tuple[Cell, ...]


def teacher_guidance(base: str) -> float:
    """Return the default guidance scale of a teacher, by its spec."""
    return _TEACHER_GUIDANCE.get(base, _PAPERS_GUIDANCE)


class Comparer:
    """Compares base model, slerp, adapter and teacher on one index."""

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
        """Initialise the comparer.

        Args:
            pipeline: the student's pipeline, with an index.
            teacher: the multi-step model's pipeline; None leaves its column out.
            scorer: scores the pictures.
            seed: seed of the initial noise, the same for all pictures.
            scale: scale of all adapters; None uses each adapter's default.
            models: further pipelines by column title, each with its own adapter and index. If there are any, the column
                of `pipeline`'s own adapter is left out.
        """
        self._models = models
        self._pipeline, self._teacher, self._scorer, self._seed, self._scale = pipeline, teacher, scorer, seed, scale

    def compare(self, prompts: Sequence[str]) -> Iterator[Comparison]:
        """Yield one comparison per prompt."""
        self._call(self._pipeline, prompts[0])  # warm-up, so that lazy loading is not timed
        for prompt in prompts:
            yield Comparison(prompt=prompt, cells=tuple(self._cells(prompt)))

    def _cells(self, prompt: str) -> Iterator[Cell]:
        pipeline = self._pipeline
        yield self._cell("base", pipeline, prompt, fusion="none")
        yield self._cell(f"slerp, w = {pipeline.config.slerp_w}", pipeline, prompt, fusion="slerp")
        yield self._oracle(prompt)
        for title, model in self._models.items():
            yield self._cell(title, model, prompt, adapter_scale=self._scale)
        if pipeline.adapter is not None and not self._models:
            title = "adapter" if self._scale is None else f"adapter, scale = {self._scale:g}"
            yield self._cell(title, pipeline, prompt, fusion="adapter", adapter_scale=self._scale)
        if self._teacher is not None:
            yield self._cell(
                f"teacher, {TEACHER_STEPS} steps",
                self._teacher,
                prompt,
                fusion="none",
                num_inference_steps=TEACHER_STEPS,
                guidance_scale=teacher_guidance(self._teacher.config.base_id),
            )

    def _oracle(self, prompt: str) -> Cell:
        """Choose w by the score of the resulting picture: an upper bound, not a usable method."""
        ws = sorted({*ORACLE_WS, self._pipeline.config.slerp_w})
        tries = [self._cell("", self._pipeline, prompt, fusion="slerp", w=w) for w in ws]
        best = max(range(len(tries)), key=lambda index: tries[index].score)
        return Cell(
            title="oracle: best w",
            image=tries[best].image,
            score=tries[best].score,
            seconds=sum(each.seconds for each in tries),
            references=tries[best].references,
            note=f"w = {ws[best]}, chosen by the score",
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
