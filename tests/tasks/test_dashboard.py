"""A corpus at a glance."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from typer.testing import CliRunner

from imagerag.cli import app
from imagerag.registry.versions import VersionInfo
from imagerag.retrieval.store import Store
from imagerag.services import prefect_environment
from imagerag.settings import Settings
from tasks.dashboard import Dashboard, History, collect
from tests.retrieval.rows import ENCODER, append, index_and_publish, make_rows

AT = datetime(2026, 2, 12, 3, 0, tzinfo=UTC)


def test_a_corpus_that_is_not_there_has_a_page(tmp_path: Path) -> None:
    page = collect(Settings(home=tmp_path), "mine", None).markdown()
    assert "| published | nothing: there is no table yet |" in page
    assert "| champion | none of this corpus |" in page
    assert "`imagerag up` starts it" in page


def test_the_command_shows_the_only_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path))
    for variable, value in prefect_environment(Settings()).items():  # so that they are put back
        monkeypatch.setenv(variable, value)
    store = Store(str(tmp_path / "index"), "mine")
    store.open_or_create(ENCODER)
    append(store, make_rows(0, 30))
    version = index_and_publish(store).version
    append(store, make_rows(30, 40))
    shown = CliRunner().invoke(app, ["status"], catch_exceptions=False).output
    assert "mine" in shown
    assert f"version {version}, 30 rows, since 20" in shown
    assert "40 rows" in shown, "not published"
    assert "encoder-a" in shown


def test_failures_runs_and_the_champion_are_shown() -> None:
    ran = FlowRun(flow_id=uuid4(), name="ingest mine", state_name="Completed", start_time=AT)
    ran.estimated_run_time = timedelta(seconds=61)
    following = FlowRun(flow_id=uuid4(), auto_scheduled=True)
    following.next_scheduled_start_time = AT + timedelta(days=1)
    history = History(
        runs=(ran,),
        next_run=following,
        failures=((AT, {"timeout": 2, "http_status": 1_200}), (AT - timedelta(days=1), {"timeout": 7})),
    )
    tags = {"imagerag.base": "tiny", "imagerag.index_version": "5"}
    champion = VersionInfo(name="mugs", version=3, aliases=("champion",), created_at=AT, run_id="", tags=tags)
    page = Dashboard(
        name="mine", index=None, champions=((champion, "http://mlflow/3"),), fault="", history=history
    ).markdown()
    assert "| reported | http_status | timeout |" in page
    assert "| 2026-02-12 03:00 UTC | 1,200 | 2 |\n| 2026-02-11 03:00 UTC | 0 | 7 |" in page
    assert "ingest mine](" in page or "| ingest mine |" in page
    assert "| Completed | 2026-02-12 03:00 UTC | 61 s |" in page
    assert "| next scheduled run | 2026-02-13 03:00 UTC |" in page
    assert "[models:/mugs/3](http://mlflow/3) of tiny, with version 5 of the index, which is not" in page
