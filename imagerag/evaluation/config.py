"""Configuration of the evaluation and the gate, validated on construction."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from imagerag.config import Config, Place
from imagerag.errors import UserError
from imagerag.limits import MAX_SEED
from imagerag.workers import WorkersConfig

WayName = Literal["base", "slerp", "best_slerp", "adapter", "random", "no_references", "champion", "teacher"]
GateMetricName = Literal["recognised", "recognised_second", "text_score", "clip_score", "aesthetics", "tifa"]
"""Metrics with a value per picture, which allow paired differences by prompt."""
MetricName = Literal[GateMetricName, "frechet", "kernel", "fid", "cmmd"]


class MetricFiles(Config):
    """Network weights of metrics. Nothing is downloaded: metrics without their files are reported as not measured."""

    clip: str | None = Field(
        default=None,
        description="Transformers folder of a CLIP model for CLIP score and CMMD; neither the retriever's nor the base "
        "model's.",
    )
    inception: str | None = Field(
        default=None, description="File with torch-fidelity's weights-inception-2015-12-05, for FID."
    )
    aesthetic_head: str | None = Field(
        default=None, description="File with LAION's aesthetic predictor for the embeddings of `clip`."
    )
    tifa_questions: str | None = Field(default=None, description="JSON file with questions in TIFA's published format.")
    tifa_vqa: str | None = Field(
        default=None, description="Transformers folder of a visual question answering model (ViLT), for TIFA."
    )


NEEDED_FILES: dict[MetricName, tuple[str, ...]] = {
    "clip_score": ("clip",),
    "aesthetics": ("clip", "aesthetic_head"),
    "tifa": ("tifa_questions", "tifa_vqa"),
    "fid": ("inception",),
    "cmmd": ("clip",),
}
"""The fields of `MetricFiles` that each metric requires."""


class EvaluateConfig(WorkersConfig):
    """What an evaluation generates and measures."""

    prompts: Place | None = Field(
        default=None,
        description="Text file with one prompt per line, optionally followed by a tab and a category; unset: the "
        "captions held out of the training.",
    )
    num_prompts: int = Field(default=200, ge=2, description="Maximum number of prompts, sampled with `seed`.")
    images_per_prompt: int = Field(default=1, ge=1, le=64, description="Pictures per prompt, with different noise.")
    ways: tuple[WayName, ...] = Field(
        default=("base", "slerp", "best_slerp", "adapter", "random", "no_references", "champion", "teacher"),
        description="Ways of making pictures to compare; the champion is skipped if there is none.",
    )
    num_references: int | None = Field(
        default=None, ge=1, le=16, description="References per picture; unset: 4 for adapters, 1 for slerp."
    )
    slerp_w: float | None = Field(
        default=None,
        ge=-1,
        le=1,
        description="Slerp weight: 1 is the base model, 0 the reference, below 0 beyond it; unset: the base model's.",
    )
    slerp_ws: tuple[Annotated[float, Field(ge=-1, le=1)], ...] = Field(
        default=(-0.5, 0.0, 0.2, 0.4, 0.6, 0.8),
        min_length=1,
        description="Slerp weights for `best_slerp`: each half of the prompts uses the best weight on the other half.",
    )
    adapter_scales: tuple[Annotated[float, Field(gt=0, le=10)], ...] = Field(
        default=(1.5, 2.0),
        description="Adapter scales, in addition to the default, for the curve of recognition against copies.",
    )
    teacher_steps: int = Field(default=25, ge=1, le=1000, description="Denoising steps of the teacher.")
    teacher_guidance: float | None = Field(
        default=None, ge=0, description="Guidance scale of the teacher; unset: 3 for `tiny-teacher`, otherwise 7.5."
    )
    files: MetricFiles = Field(default=MetricFiles(), description="Network weights of metrics.")
    batch_size: int = Field(default=16, ge=1, le=256, description="Pictures per batch on a worker.")
    seed: int = Field(
        default=0,
        ge=0,
        le=MAX_SEED,
        description="Seed of the noise, the random references and the choice of prompts.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not {"base", "best_slerp", "adapter"} <= set(self.ways):
            raise UserError(
                "the gate compares `adapter` with the baselines `base` and `best_slerp`: all three have to be among "
                f"the ways; got {self.ways}"
            )
        return self

    def lacking(self, metric: MetricName) -> str:
        """Return a message that names a metric's missing files; empty if none is missing."""
        fields = [field for field in NEEDED_FILES.get(metric, ()) if getattr(self.files, field) is None]
        return f"needs {' and '.join(f'files.{field}' for field in fields)}" if fields else ""


class GateConfig(Config):
    """What a candidate must reach to become champion."""

    metric: GateMetricName = Field(
        default="recognised",
        description="Metric of the gate. The candidate must beat the base model and the champion (95 % confidence "
        "interval of the paired difference above 0), and be no worse than slerp with cross-validated w.",
    )
    min_prompts: int = Field(
        default=20, ge=2, description="Fewest prompts for which the metric must have been measured in all methods."
    )
    max_loss: float = Field(
        default=0.1,
        ge=0,
        description="Largest allowed loss in any other metric, relative to the base model.",
    )
    max_slowdown: float = Field(
        default=2.0, ge=1, description="Largest allowed latency, as a multiple of the base model's (median over pairs)."
    )

    def check(self, evaluation: EvaluateConfig) -> None:
        """Check that the evaluation measures the gate's metric.

        Raises:
            UserError: if a file that the metric requires is not given.
        """
        if lacking := evaluation.lacking(self.metric):
            raise UserError(f"the gate decides by {self.metric}, which the evaluation can't measure: it {lacking}")
