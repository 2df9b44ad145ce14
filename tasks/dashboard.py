"""The status page of a corpus: its published index, the champions that use it, and its runs in Prefect."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prefect import Flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from prefect.utilities.urls import url_for

from imagerag.errors import UserError
from imagerag.plain import in_markdown
from imagerag.registry.versions import CHAMPION, VersionInfo, versions_of_index
from imagerag.retrieval.publish import IndexStatus, status
from imagerag.retrieval.store import Store
from imagerag.services import mlflow_link
from imagerag.settings import DEFAULT_NAME, Settings
from tasks.report import FAILURES, artifact_key, table

_FLOWS = ("ingest", "reindex", "features", "finetune", "evaluate", "pipeline")
_NUM_RUNS = 10
_NUM_FAILURES = 8
_NUM_SCHEDULED = 100


@dataclass(frozen=True, kw_only=True)
class History:
    """Runs and failures of a corpus, from a Prefect server."""

    runs: tuple[FlowRun, ...]
    """Started runs, latest first."""
    next_run: FlowRun | None
    failures: tuple[tuple[datetime, Mapping[str, int]], ...]
    """Time of each report of `ingest` or `reindex`, and the number of failed rows by reason; latest first."""


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """The status of a corpus: published index, champions, past runs and the next scheduled run."""

    name: str
    index: IndexStatus | None
    """None if there is no table."""
    champions: tuple[tuple[VersionInfo, str | None], ...]
    """Champions of registered models that use the corpus, with their pages in a running MLflow server."""
    fault: str
    """Error message if the registry can't be read, otherwise empty."""
    history: History | None
    """None without a running server."""

    def markdown(self) -> str:
        """Return the page in markdown, for Prefect's UI and the terminal."""
        pages = [f"# {self.name}", table(self._index_figures() | self._champion_figures() | self._next_figures())]
        if self.history is None:
            pages.append("Runs are kept by Prefect's server, which is stopped: `imagerag up` starts it.")
        else:
            pages += ["## Failed rows by reason", _failures(self.history), "## Last runs", _runs(self.history)]
        return "\n\n".join(pages) + "\n"

    def _index_figures(self) -> dict[str, str]:
        index = self.index
        if index is None:
            return {"published": "nothing: there is no table yet"}
        figures = {"published": "nothing yet"}
        if (version := index.published_version) is not None:
            since = [_time(each.published_at) for each in index.history if each.version == version]
            figures["published"] = f"version {version}, {index.num_rows:,} rows, since {''.join(since)}"
            figures["recall@10"] = f"{index.recall_at_10:.3f} ({index.kind})"
        if index.unpublished_changes:
            figures["not published"] = f"version {index.newest_version}, {index.num_newest_rows:,} rows"
        figures["encoder"] = index.encoder.id
        by_base = (f"{each.base} ({each.num_rows:,} of {index.num_rows:,} rows)" for each in index.features)
        return figures | {"features": ", ".join(by_base) or "none"}

    def _champion_figures(self) -> dict[str, str]:
        shown = ", ".join(self._shown(*each) for each in self.champions)
        return {"champion": shown or self.fault or "none of this corpus"}

    def _shown(self, champion: VersionInfo, link: str | None) -> str:
        version = int(champion.pinned("index_version"))
        now = self.index.published_version if self.index else None
        behind = "" if version == now else ", which is not what is published"
        model = f"models:/{champion.name}/{champion.version}"
        model = f"[{model}]({link})" if link else model
        return f"{model} of {champion.pinned('base')}, with version {version} of the index{behind}"

    def _next_figures(self) -> dict[str, str]:
        if self.history is None:
            return {}
        run = self.history.next_run
        at = run.next_scheduled_start_time if run else None
        return {"next scheduled run": "none" if at is None else f"{_time(at)}"}


def collect(settings: Settings, name: str, client: SyncPrefectClient | None) -> Dashboard:
    """Collect the status of a corpus.

    Args:
        settings: locations of the index and MLflow.
        name: name of the corpus.
        client: client of the Prefect server, None if none runs.
    """
    store, fault = Store(settings.index_uri, name), ""
    champions: list[VersionInfo] = []
    try:
        champions = [each for each in versions_of_index(settings, name) if CHAMPION in each.aliases]
    except UserError as error:
        fault = in_markdown(str(error))
    return Dashboard(
        name=name,
        index=status(store) if store.exists else None,
        champions=tuple(
            (each, mlflow_link(settings, f"models/{each.name}/versions/{each.version}")) for each in champions
        ),
        fault=fault,
        history=None if client is None else _history(name, client),
    )


def write_dashboard(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Update the status page of a run's corpus: every flow's completion and failure hook."""
    del flow, state
    name = _name(flow_run)
    with get_client(sync_client=True) as client:
        page = collect(Settings(), name, client).markdown()
    create_markdown_artifact(page, key=artifact_key("status", name), description=f"All of {name} at a glance")


def _history(name: str, client: SyncPrefectClient) -> History:
    named = FlowRunFilterName(any_=[f"{flow} {name}" for flow in _FLOWS])  # names of started runs
    scheduled = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
    waiting = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=scheduled),
        sort=FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC,
        limit=_NUM_SCHEDULED,
    )
    reports = client.read_artifacts(
        artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[artifact_key(FAILURES, name)])),
        sort=ArtifactSort.CREATED_DESC,
        limit=_NUM_FAILURES,
    )
    return History(
        runs=tuple(
            client.read_flow_runs(
                flow_run_filter=FlowRunFilter(name=named), sort=FlowRunSort.START_TIME_DESC, limit=_NUM_RUNS
            )
        ),
        next_run=next((run for run in waiting if run.auto_scheduled and _name(run) == name), None),
        failures=tuple((each.created, _counts(each.data)) for each in reports if each.created is not None),
    )


def _name(run: FlowRun) -> str:
    return str(run.parameters.get("name", DEFAULT_NAME))


def _counts(data: Any) -> dict[str, int]:
    rows = json.loads(data) if isinstance(data, str) else data
    return {row["reason"]: row["rows"] for row in rows}


def _failures(history: History) -> str:
    """Return a table with a row per report and a column per reason."""
    reasons = sorted({reason for _, counts in history.failures for reason in counts})
    if not reasons:
        return "None."
    lines = [f"| reported | {' | '.join(reasons)} |", f"|---|{'---:|' * len(reasons)}"]
    for at, counts in history.failures:
        lines.append(f"| {_time(at)} | {' | '.join(f'{counts.get(reason, 0):,}' for reason in reasons)} |")
    return "\n".join(lines)


def _runs(history: History) -> str:
    lines = ["| run | state | started | took |", "|---|---|---|---:|"]
    for run in history.runs:
        link = url_for("flow-run", obj_id=run.id)
        started = "" if run.start_time is None else _time(run.start_time)
        shown = f"[{run.name}]({link})" if link else run.name
        lines.append(f"| {shown} | {run.state_name} | {started} | {run.estimated_run_time.total_seconds():,.0f} s |")
    return "\n".join(lines)


def _time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
