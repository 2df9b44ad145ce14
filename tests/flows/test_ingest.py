"""`ingest` and `reindex` through a real Prefect server, on the sample corpus."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from flows.ingest import NotPublishedError, ingest
from flows.reindex import reindex
from imagerag.cli import app
from imagerag.embedded.sample.server import BAD_URLS, SampleServer
from imagerag.errors import UserError
from imagerag.retrieval.publish import rollback, status
from imagerag.retrieval.store import Store
from tasks.report import CorpusReport
from tests.jobs import use_jobs_here

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("ray_session", "prefect_api_url", "jobs_here")]

NUM_IMAGES = 120
Finished = tuple[Path, CorpusReport, set[Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[SampleServer]:
    with SampleServer() as server:
        yield server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def finished(server: SampleServer, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A home where everything was ingested, which is only read; the report, and the progress bars that it left."""
    folder = tmp_path_factory.mktemp("finished")
    bars_before = {artifact.id for artifact in _artifacts("progress")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGERAG_HOME", str(folder / "home"))
        use_jobs_here(patch)
        report = ingest(**_parameters(server.url_list(limit=NUM_IMAGES), folder))
    return folder / "home", report, {bar.data for bar in _artifacts("progress") if bar.id not in bars_before}


@pytest.fixture
def before(home: Path, finished: Finished) -> CorpusReport:
    """A copy of that home is the test's own; returns what was ingested."""
    shutil.copytree(finished[0], home)
    return finished[1]


def _parameters(urls: pa.Table, folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "urls.parquet"
    pq.write_table(urls, path)
    download = {"allowed_hosts": ["127.0.0.1"], "image_format": "webp", "timeout_s": 1, "retries": 1, "shard_size": 50}
    return {"url_list": str(path), "name": "flow", "download": download} | changes


def _artifacts(kind: str) -> list[Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterType

    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(type=ArtifactFilterType(any_=[kind])))


def _rows(home: Path) -> pa.Table:
    store = Store(str(home / "index"), "flow")
    return store.dataset(status(store).published_version).to_table(columns=["id", "url", "caption"]).sort_by("id")


def _captions(home: Path) -> list[str]:
    captions: list[str] = _rows(home)["caption"].to_pylist()
    return captions


def test_ingest_publishes_every_good_image_and_a_second_run_does_nothing(
    server: SampleServer,
    home: Path,
    tmp_path: Path,
    before: CorpusReport,
    finished: Finished,
) -> None:
    urls, first = server.url_list(limit=NUM_IMAGES), before
    failed = sum(bad.reason is not None for bad in BAD_URLS)
    assert first.download.num_urls == urls.num_rows
    assert first.download.num_failed == failed == sum(first.download.reasons.values())
    assert first.download.num_success == urls.num_rows - failed
    assert first.embedded.num_rows == first.download.num_success - first.embedded.num_duplicates
    assert first.publication.published
    assert first.embedded.machine_s > 0
    assert _rows(home).num_rows == first.embedded.num_rows

    second = ingest(**_parameters(urls, tmp_path))
    assert second.download.num_fetched == 1, "what brought a timeout is tried again"
    assert (second.embedded.num_added, second.embedded.num_removed) == (0, 0)
    assert second.publication.version == first.publication.version
    assert status(Store(str(home / "index"), "flow")).newest_version == first.publication.version

    assert finished[2] == {100.0}
    pages = [artifact.data for artifact in _artifacts("markdown") if artifact.key == "corpus-flow"]
    assert any(f"{first.embedded.num_rows:,}" in page and "recall@10" in page for page in pages)


def test_reindex_touches_only_what_changed(
    server: SampleServer, home: Path, tmp_path: Path, before: CorpusReport
) -> None:
    everything = server.url_list(limit=NUM_IMAGES + 5)
    good = everything.filter(pc.invert(pc.match_substring(everything["url"], "/bad/")))
    old = {row["url"]: row for row in _rows(home).to_pylist()}

    seven = good.filter(pc.is_in(good["url"], pa.array(old)))["url"].slice(0, 7).combine_chunks()
    kept = good.filter(pc.invert(pc.is_in(good["url"], seven)))
    captions = kept["caption"].to_pylist()
    place = next(place for place, url in enumerate(kept["url"].to_pylist()) if url in old)
    captions[place] = 'it\'s a "new" caption'
    changed = kept.set_column(kept.column_names.index("caption"), "caption", pa.array(captions))
    after = reindex(**_parameters(changed, tmp_path))
    new = {row["url"]: row for row in _rows(home).to_pylist()}

    num_gone = len(old.keys() - set(changed["url"].to_pylist()))
    assert num_gone >= 7
    assert after.download.num_fetched == 5 + 1
    assert (after.embedded.num_added, after.embedded.num_removed) == (5 + 1, num_gone + 1)
    assert after.rows_before == before.embedded.num_rows
    changed_url = changed["url"][place].as_py()
    assert new[changed_url]["caption"] == captions[place]
    assert new.keys() == set(changed["url"].to_pylist())
    assert all(new[url] == row for url, row in old.items() if url in new and url != changed_url)


def test_what_was_taken_down_does_not_come_back(
    server: SampleServer, home: Path, tmp_path: Path, before: CorpusReport
) -> None:
    urls = server.url_list(limit=NUM_IMAGES)
    # The twin's row names the other URL, and a third URL brings the same image under another caption: the image goes.
    remove = ["index", "remove", "--name", "flow", "--yes", "--url", f"{server.url}/bad/twin-b.png"]
    result = CliRunner().invoke(app, remove)
    assert result.exit_code == 0, result.output
    after = ingest(**_parameters(urls, tmp_path))
    assert after.publication.published
    assert after.download.reasons["taken_down"] == 3
    assert after.download.num_fetched == 1, "what brought a timeout"
    assert _rows(home).num_rows == after.embedded.num_rows == before.embedded.num_rows - 2
    assert not {"one image under two URLs", "an image that comes at the second try"} & set(_captions(home))


def test_a_version_that_fails_its_checks_is_not_published(
    server: SampleServer, home: Path, tmp_path: Path, before: CorpusReport
) -> None:
    urls = server.url_list(limit=NUM_IMAGES)
    good = urls.filter(pc.invert(pc.match_substring(urls["url"], "/bad/")))
    store = Store(str(home / "index"), "flow")
    with pytest.raises(UserError, match=rf"shrink from {before.embedded.num_rows} rows to 10; at most 50% may go"):
        reindex(**_parameters(good.slice(0, 10), tmp_path))
    assert status(store).newest_version == before.publication.version, "a list that was cut short deletes nothing"
    reindex(**_parameters(good.slice(1), tmp_path))
    rollback(store)
    with pytest.raises(NotPublishedError, match=r"newer: .* was rolled back"):
        reindex(**_parameters(good.slice(1), tmp_path))
    assert status(store).published_version == before.publication.version
    assert _rows(home).num_rows == before.embedded.num_rows


def test_the_users_mistake_fails_at_once_without_a_traceback(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "urls.csv").write_text("address,words\nhttp://a.example/1.png,a cat\n")
    with pytest.raises(UserError, match="url"):
        ingest(url_list=str(tmp_path / "urls.csv"), name="flow")
    assert not any(record.exc_info for record in caplog.records)
    assert list((home / "index").glob("*.lance")) == []
