"""The flow `pipeline`: run the other flows from images to a registered champion; finished work is skipped."""

import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

from prefect.runtime import flow_run
from pydantic import Field, model_validator

from flows.evaluate import EvaluateParameters, evaluate
from flows.features import FeaturesParameters, features
from flows.finetune import FinetuneParameters, finetune
from flows.ingest import CorpusParameters, ingest
from imagerag.config import Config
from imagerag.errors import UserError
from imagerag.evaluation.config import EvaluateConfig, GateConfig
from imagerag.hspace.config import FeaturesConfig
from imagerag.settings import settings_of
from imagerag.training import config
from imagerag.training.config import FinetuneConfig, SynthesizeConfig, TrainWorkersConfig
from tasks.parameters import flow_of
from tasks.report import EvaluateReport, PipelineReport, Stage, write_pipeline_report

R = TypeVar("R")


class PipelineParameters(CorpusParameters):
    """Parameters of `ingest` and of the flows that follow it on its index."""

    features: FeaturesConfig = Field(default=FeaturesConfig(), description="How to compute cached features.")
    data: SynthesizeConfig = Field(default=config.tiny().data, description="Training data.")
    training: FinetuneConfig = Field(default=config.tiny().training, description="Optimisation.")
    workers: TrainWorkersConfig = Field(default=TrainWorkersConfig(), description="Training workers.")
    evaluation: EvaluateConfig = Field(default=EvaluateConfig(), description="What to generate and measure.")
    gate: GateConfig = Field(default=GateConfig(), description="Conditions for a candidate to become champion.")
    model_name: str | None = Field(
        default=None, description="Registered model in MLflow; unset: the setting IMAGERAG_MODEL_NAME."
    )
    portable: bool = Field(default=False, description="Pack a copy of the index into the registered model.")

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.features.base != self.data.base:
            raise UserError(
                f"features are made by the base model that learns to use them: features.base is {self.features.base} "
                f"and data.base is {self.data.base}"
            )
        self.gate.check(self.evaluation)
        settings_of(self.model_name)
        return self

    def part(self, model: type[Config]) -> dict[str, Any]:
        """Return the parameters that the flow with the parameters `model` takes."""
        return {field: getattr(self, field) for field in model.model_fields if hasattr(self, field)}


@flow_of(PipelineParameters)
def pipeline(parameters: PipelineParameters) -> PipelineReport:
    """Run everything from images, or a list of their URLs, to a champion: ingest, features, finetune, evaluate.

    In a second run, every flow continues unfinished work and reports what was done before.
    """
    corpus, corpus_s = _timed(lambda: ingest(**parameters.part(CorpusParameters)))
    cached, cached_s = _timed(lambda: features(**parameters.part(FeaturesParameters)))
    trained, trained_s = _timed(lambda: finetune(**parameters.part(FinetuneParameters)))
    assert trained.finetuned is not None, trained
    assert trained.training_set is not None, trained
    adapter = trained.finetuned.uri
    evaluated, evaluated_s = _timed(lambda: evaluate(**parameters.part(EvaluateParameters), adapter=adapter))
    fetched, added = corpus.download.num_fetched, corpus.embedded.num_added
    is_more = corpus.download.num_bytes or added  # URLs that only failed again do not count
    stages = (
        Stage(name="ingest", made=f"{fetched:,} fetched, {added:,} rows" if is_more else "", seconds=corpus_s),
        Stage(name="features", made=_rows(cached.cached.num_added), seconds=cached_s),
        Stage(
            name="finetune",
            made=f"{trained.finetuned.num_steps:,} steps" if trained.finetuned.is_new else "",
            seconds=trained_s,
        ),
        Stage(
            name="evaluate",
            made=_measured(evaluated),
            seconds=evaluated_s,
        ),
    )
    report = PipelineReport(
        name=parameters.name,
        flow_run_id=str(flow_run.id),
        stages=stages,
        corpus=corpus,
        features=cached,
        finetune=trained,
        evaluate=evaluated,
    )
    write_pipeline_report(report)
    return report


def _timed(run: Callable[[], R]) -> tuple[R, float]:
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def _measured(report: EvaluateReport) -> str:
    made = [f"{report.evaluated.num_prompts:,} prompts"] if report.evaluated.is_new else []
    return ", ".join(made + ([report.registered.uri] if report.registered.is_new else []))


def _rows(count: int) -> str:
    return f"{count:,} rows" if count else ""
