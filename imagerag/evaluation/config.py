"""How models are evaluated, and what a candidate must reach: every value checked when it is built."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from imagerag.config import Config
from imagerag.errors import UserError
from imagerag.limits import MAX_SEED
from imagerag.workers import WorkersConfig

WayName = Literal["base", "slerp", "best_slerp", "adapter", "random", "no_references", "champion", "teacher"]
GateMetricName = Literal["recognised", "recognised_second", "text_score", "clip_score", "aesthetics", "tifa"]
"""Metrics of single pictures, which can be paired by prompt."""
MetricName = Literal[GateMetricName, "frechet", "kernel", "fid", "cmmd"]


class MetricFiles(Config):
    """Weights that metrics need. Nothing is fetched: a metric whose files are not given is reported as not measured."""

    clip: str | None = Field(
        default=None,
        description="A transformers folder of a CLIP that neither retrieves nor conditions, for CLIP score and CMMD.",
    )
    inception: str | None = Field(
        default=None, description="A file of torch-fidelity's weights-inception-2015-12-05, for FID."
    )
    aesthetic_head: str | None = Field(
        default=None, description="A file of LAION's aesthetic predictor for the embeddings of `clip`."
    )
    tifa_questions: str | None = Field(default=None, description="A JSON file of questions as TIFA publishes them.")
    tifa_vqa: str | None = Field(
        default=None, description="A transformers folder of a visual question answering model, for TIFA."
    )


NEEDED_FILES: dict[MetricName, tuple[str, ...]] = {
    "clip_score": ("clip",),
    "aesthetics": ("clip", "aesthetic_head"),
    "tifa": ("tifa_questions", "tifa_vqa"),
    "fid": ("inception",),
    "cmmd": ("clip",),
}
"""What metrics need of `MetricFiles`."""


class EvaluateConfig(WorkersConfig):
    """What is generated and measured."""

    prompts: str | None = Field(
        default=None,
        description="A text file with a prompt on each line, and after a tab its category if it has one; unset: the "
        "captions that the training held out.",
    )
    num_prompts: int = Field(default=200, ge=2, description="At most so many, chosen by the seed.")
    images_per_prompt: int = Field(default=1, ge=1, le=64, description="Each from a noise of its own.")
    ways: tuple[WayName, ...] = Field(
        default=("base", "slerp", "best_slerp", "adapter", "random", "no_references", "champion", "teacher"),
        description="How pictures are made; the champion is left out where there is none.",
    )
    num_references: int | None = Field(default=None, ge=1, le=16, description="Unset: 4 for adapters, 1 for slerp.")
    slerp_w: float | None = Field(
        default=None, ge=0, le=1, description="1 is the base model, 0 the reference; unset: the base model's own."
    )
    slerp_ws: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(0.0, 0.2, 0.4, 0.6, 0.8),
        min_length=1,
        description="Of `best_slerp`: each half of the prompts gets the one that is the best on the other half.",
    )
    adapter_scales: tuple[Annotated[float, Field(gt=0, le=10)], ...] = Field(
        default=(1.5, 2.0), description="Beside the adapter's own, for the curve of copies and recognition."
    )
    teacher_steps: int = Field(default=25, ge=1, le=1000, description="Of the teacher.")
    teacher_guidance: float | None = Field(default=None, ge=0, description="Unset: the paper's 7.5, 3 for `tiny`.")
    files: MetricFiles = Field(default=MetricFiles(), description="Weights that metrics need.")
    batch_size: int = Field(default=16, ge=1, le=256, description="Pictures that a worker makes at a time.")
    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="Of the noise, the random references and the choice of prompts."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not {"base", "best_slerp", "adapter"} <= set(self.ways):
            raise UserError(
                "the gate compares `adapter` with `base` and with `best_slerp`, the best that needs no training: all "
                f"three have to be among the ways; got {self.ways}"
            )
        return self

    def lacking(self, metric: MetricName) -> str:
        """Return what a metric needs and is not given, for people; nothing if it can be tried."""
        fields = [field for field in NEEDED_FILES.get(metric, ()) if getattr(self.files, field) is None]
        return f"needs {' and '.join(f'files.{field}' for field in fields)}" if fields else ""


class GateConfig(Config):
    """What a candidate must reach to become champion."""

    metric: GateMetricName = Field(
        default="recognised",
        description="It has to be better than the base model's and the champion's (the 95 % interval of the paired "
        "difference lies above zero), and no worse than that of slerp with the w that is best on other prompts.",
    )
    max_loss: float = Field(
        default=0.1,
        ge=0,
        description="Every other metric may be worse than the base model's by this share of it at most.",
    )
    max_slowdown: float = Field(
        default=2.0, ge=1, description="A picture may take so many times the base model's, as a median over pairs."
    )

    def check(self, evaluation: EvaluateConfig) -> None:
        """Raise UserError where the evaluation can't measure what the gate decides by."""
        if lacking := evaluation.lacking(self.metric):
            raise UserError(f"the gate decides by {self.metric}, which the evaluation can't measure: it {lacking}")
