"""`ingest` and `reindex` of a folder of images through a real Prefect server."""

from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from flows.ingest import ingest
from flows.reindex import reindex
from imagerag.retrieval.publish import PublishConfig, status
from imagerag.retrieval.store import Store
from tests.corpus.web import picture

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("ray_session", "prefect_api_url", "jobs_here")]

CAPTIONS = {"a.png": "a red mug", "b/c.png": "a blue cup", "b/d.png": "a green bowl"}


def _pages(key: str = "corpus-folder") -> list[str]:
    with get_client(sync_client=True) as client:
        return [artifact.data for artifact in client.read_artifacts() if artifact.key == key]


def test_a_folder_is_published_with_its_captions_and_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path / "home"))
    folder, captions = tmp_path / "images", tmp_path / "captions.csv"
    (folder / "b").mkdir(parents=True)
    for seed, name in enumerate(CAPTIONS):
        (folder / name).write_bytes(picture(seed, image_format="PNG"))
    captions.write_text("file,caption\n" + "".join(f"{name},{caption}\n" for name, caption in CAPTIONS.items()))
    half_may_go = PublishConfig(max_shrink=0.5)
    parameters = {"url_list": str(folder), "captions": str(captions), "name": "folder", "publish": half_may_go}

    def captions_there() -> set[str]:
        store = Store(str(tmp_path / "home" / "index"), "folder")
        rows = store.dataset(status(store).published_version).to_table(columns=["caption"])
        return set(rows["caption"].to_pylist())

    state = ingest(**parameters, return_state=True)
    first = state.result()
    assert (first.download.num_success, first.embedded.num_added) == (3, 3)
    assert captions_there() == set(CAPTIONS.values())
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
    assert (run.name, run.tags) == ("ingest folder", ["corpus:folder"])
    (page,) = _pages()
    cost = page.partition("## Cost")[2]
    assert "| machine-seconds | " in cost
    assert "| images | 3 fetched, 3 embedded |" in cost
    assert f"| bytes of images stored | {first.download.num_bytes:,} |" in cost

    (at_a_glance,) = _pages("status-folder")
    assert ", 3 rows, since " in at_a_glance
    assert "| Completed |" in at_a_glance.partition("[ingest folder]")[2]

    (folder / "b" / "d.png").unlink()
    captions.write_text("file,caption\na.png,a red mug\nb/c.png,a blue cup\n")
    second = reindex(**parameters)
    assert (second.download.num_fetched, second.embedded.num_added, second.embedded.num_removed) == (0, 0, 1)
    assert captions_there() == {"a red mug", "a blue cup"}
    cost = next(page for page in _pages() if "0 tried" in page).partition("## Cost")[2]
    assert "| wall time | " in cost
    assert "images" not in cost, "there were none"
