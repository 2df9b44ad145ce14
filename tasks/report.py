"""Reports of flow runs, as artifacts in the Prefect UI."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from imagerag.artifacts import (
    CachedFeatures,
    Download,
    Embedded,
    Evaluated,
    Finetuned,
    IndexBuild,
    Publication,
    Registered,
    TrainingSet,
)
from imagerag.evaluation.gate import Decision
from imagerag.evaluation.results import PAGE, read_results
from imagerag.plain import in_markdown
from imagerag.services import mlflow_link
from imagerag.settings import Settings
from imagerag.training.config import describe_accuracy
from imagerag.training.plan import Plan
from tasks.cost import Measured, cost

FAILURES = "failures"
"""Kind of the artifact with a corpus's failed rows by reason."""


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """Results of a run of `ingest` or `reindex`."""

    name: str
    rows_before: int
    download: Download
    embedded: Embedded
    index: IndexBuild
    publication: Publication

    def rows(self) -> list[dict[str, str]]:
        """Return figures and their values, in reading order."""
        download, embedded, index, publication = self.download, self.embedded, self.index, self.publication
        before, after = (_version(v) for v in (publication.previous_version, publication.version))
        outcome = "" if publication.published else " (the new version failed its checks)"
        figures = {
            "rows wanted": f"{download.num_urls:,} ({download.num_duplicates:,} more repeated in the list)",
            "downloaded now": f"{download.num_fetched:,} tried{_rate(download.num_fetched, download.duration_s)}",
            **_refreshed(download),
            "images": f"{download.num_success:,} fine, {download.num_failed:,} failed",
            "embedded now": f"{embedded.num_added:,} added, {embedded.num_removed:,} removed"
            f"{_rate(embedded.num_added, embedded.duration_s)}",
            "rows, before and after": f"{self.rows_before:,} → {embedded.num_rows:,}",
            "index": f"{index.kind}, recall@10 {index.recall_at_10:.3f}",
            "published, before and after": f"{before} → {after}{outcome}",
        }
        return [{"figure": figure, "value": value} for figure, value in figures.items()]

    def markdown(self) -> str:
        """Return the report in markdown."""
        lines = [f"# {self.name}", "", table({row["figure"]: row["value"] for row in self.rows()})]
        lines += ["", "## Checks before publishing", "", "| check | result | seen |", "|---|---|---|"]
        checks = self.publication.checks
        lines += [f"| {check.name} | {'pass' if check.passed else '**fail**'} | {check.detail} |" for check in checks]
        if self.download.reasons:
            lines += ["", "## Failed rows by reason", "", "| reason | rows | the first of them |", "|---|---:|---|"]
            lines += [
                f"| {reason} | {count:,} | {'<br>'.join(map(in_markdown, self.download.examples.get(reason, ())))} |"
                for reason, count in _by_count(self.download.reasons)
            ]
        return "\n".join(lines)

    def failures(self) -> list[dict[str, str | int]]:
        """Return failed rows by reason with the first of them, in markdown, as which Prefect shows a table's texts."""
        return [
            {
                "reason": reason,
                "rows": count,
                "first": "\n".join(map(in_markdown, self.download.examples.get(reason, ()))),
            }
            for reason, count in _by_count(self.download.reasons)
        ]


@task(name="report", cache_policy=NO_CACHE)
def write_report(report: CorpusReport) -> None:
    """Create a markdown artifact with the report, and a table artifact with the failures."""
    stages = (report.download, report.embedded)
    _write("corpus", report.name, f"What the run did to {report.name}", report.markdown(), stages)
    create_table_artifact(
        report.failures(),
        key=artifact_key(FAILURES, report.name),
        description=f"Failed rows of {report.name} by reason",
    )


@dataclass(frozen=True, kw_only=True)
class FeaturesReport:
    """Results of a run of `features`."""

    name: str
    cached: CachedFeatures
    publication: Publication

    def markdown(self) -> str:
        """Return the report in markdown."""
        cached = self.cached
        figures = {
            "base model": f"{cached.base_id} (features' digest {cached.features_digest})",
            "fit of pictures": cached.fit,
            "encoded now": f"{cached.num_added:,} of {cached.num_rows:,} rows"
            f"{_rate(cached.num_added, cached.duration_s)}",
            "published": _version(self.publication.version),
        }
        return f"# {self.name}: features\n\n{table(figures)}"


@task(name="report", cache_policy=NO_CACHE)
def write_features_report(report: FeaturesReport) -> None:
    """Create a markdown artifact with the report."""
    _write("features", report.name, f"Cached features of {report.name}", report.markdown(), (report.cached,))


@dataclass(frozen=True, kw_only=True)
class FinetuneReport:
    """Results of a run of `finetune`; a dry run has only a plan."""

    name: str
    plan: Plan
    training_set: TrainingSet | None = None
    finetuned: Finetuned | None = None

    def markdown(self, finetuned: Finetuned, training_set: TrainingSet) -> str:
        """Return the report in markdown."""
        rows = f"{training_set.num_real:,} of the index, {training_set.num_teacher:,} by the teacher"
        figures = {
            "base model": f"{finetuned.base} (digest {finetuned.base_digest})",
            "index": f"version {finetuned.index_version}",
            "rows": f"{rows}; {training_set.num_held_out:,} held out",
            "steps": f"{finetuned.num_steps:,}",
            "validation score": f"{finetuned.score:.4f}; best {finetuned.best_score:.4f} at {finetuned.best_step:,}",
            "time": f"{finetuned.duration_s:.0f} s" if finetuned.is_new else "finished before",
            "adapter": finetuned.uri,
            "MLflow run": _in_mlflow(finetuned.run_id, f"runs/{finetuned.run_id}"),
        }
        if finetuned.discriminator_accuracy is not None:
            figures["discriminator"] = describe_accuracy(finetuned.discriminator_accuracy)
        return f"# {self.name}: fine-tuning\n\n{table(figures)}"


@task(name="report", cache_policy=NO_CACHE)
def write_finetune_report(report: FinetuneReport) -> None:
    """Create a markdown artifact with the report."""
    assert report.finetuned is not None, report
    assert report.training_set is not None, report
    markdown = report.markdown(report.finetuned, report.training_set)
    _write("finetune", report.name, f"An adapter for {report.name}", markdown, (report.training_set,))


@dataclass(frozen=True, kw_only=True)
class EvaluateReport:
    """Results of a run of `evaluate`."""

    name: str
    evaluated: Evaluated
    decision: Decision
    registered: Registered

    def markdown(self) -> str:
        """Return the report in markdown."""
        state = "champion" if self.registered.is_champion else "candidate"
        model, run_id = self.registered, self.evaluated.run_id
        link = _in_mlflow(model.uri, f"models/{model.name}/versions/{model.version}")
        lines = [f"# {self.name}: evaluation", "", f"{link} is {state}.", "", self.decision.markdown()]
        lines += ["", "## Measured", "", read_results(self.evaluated.uri).markdown()]
        lines += [f"Pictures: `{self.evaluated.uri}/{PAGE}`", "", f"MLflow run: {_in_mlflow(run_id, f'runs/{run_id}')}"]
        return "\n".join(lines)


@task(name="report", cache_policy=NO_CACHE)
def write_evaluate_report(report: EvaluateReport) -> None:
    """Create a markdown artifact with the report."""
    _write("evaluation", report.name, f"An adapter for {report.name}", report.markdown(), ())


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run of `pipeline`."""

    name: str
    made: str
    """Work done in this run; empty if everything was done before."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """Results of a run of `pipeline`."""

    name: str
    flow_run_id: str
    stages: tuple[Stage, ...]
    corpus: CorpusReport
    features: FeaturesReport
    finetune: FinetuneReport
    evaluate: EvaluateReport

    def summary(self) -> str:
        """Return a table of the stages, with the work that this run did."""
        lines = [f"# {self.name}: from URLs to a model", "", "| stage | made now | seconds |", "|---|---|---:|"]
        for stage in self.stages:
            lines.append(f"| {stage.name} | {stage.made or 'nothing: done before'} | {stage.seconds:.0f} |")
        return "\n".join(lines)

    def markdown(self) -> str:
        """Return the report in markdown."""
        return f"{self.summary()}\n\n{self.evaluate.markdown()}"


@task(name="report", cache_policy=NO_CACHE)
def write_pipeline_report(report: PipelineReport) -> None:
    """Create a markdown artifact with the report."""
    assert report.finetune.training_set is not None, report
    corpus = report.corpus
    stages = (corpus.download, corpus.embedded, report.features.cached, report.finetune.training_set)
    _write("pipeline", report.name, f"From URLs to a model: {report.name}", report.markdown(), stages)


def _in_mlflow(text: str, page: str) -> str:
    """Return text in markdown, linked to a page of MLflow's UI if its server runs."""
    link = mlflow_link(Settings(), page)
    return f"[{text}]({link})" if link else f"`{text}`"


def _refreshed(download: Download) -> dict[str, str]:
    """Return the figures of a refresh, empty if there was none."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in _by_count(download.kept))
    num_kept = sum(download.kept.values())
    if not download.num_unchanged + download.num_changed + num_kept:
        return {}
    figures = f"{download.num_unchanged:,} unchanged, {download.num_changed:,} changed"
    return {"asked again": f"{figures}, {num_kept:,} kept that did not come ({reasons})" if num_kept else figures}


def _write(kind: str, name: str, description: str, markdown: str, stages: Sequence[Measured]) -> None:
    """Create a markdown artifact with a page, which ends with the cost of the running flow."""
    page = f"{markdown}\n\n## Cost\n\n{table(cost(stages))}\n"
    create_markdown_artifact(page, key=artifact_key(kind, name), description=description)


def artifact_key(kind: str, name: str) -> str:
    """Return the key of a corpus's artifact of a kind."""
    return f"{kind}-{name.replace('_', '-')}"


def table(figures: Mapping[str, str]) -> str:
    """Return a markdown table of figures and their values."""
    rows = (f"| {figure} | {value} |" for figure, value in figures.items())
    return "\n".join(["| what | figure |", "|---|---|", *rows])


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _version(version: int | None) -> str:
    return "nothing" if version is None else f"version {version}"


def _rate(count: int, duration_s: float) -> str:
    return f", {count / duration_s:,.1f}/s" if count and duration_s else ""
