"""The flow `pipeline`: run the other flows from images to a registered champion; finished work is skipped."""

import time
from collections.abc import Callable
from typing import TypeVar

from prefect.runtime import flow_run

from flows.evaluate import evaluate
from flows.features import features
from flows.finetune import finetune
from flows.ingest import ingest
from flows.parameters import (
    CorpusParameters,
    EvaluateParameters,
    FeaturesParameters,
    FinetuneParameters,
    PipelineParameters,
)
from tasks.parameters import flow_of
from tasks.report import EvaluateReport, PipelineReport, Stage, write_pipeline_report

R = TypeVar("R")


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
