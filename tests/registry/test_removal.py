"""Versions that are removed, and artifacts that a takedown deletes: all of them, and nothing else."""

from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from imagerag.registry.fetch import download
from imagerag.registry.promotion import promote, rollback
from imagerag.registry.removal import prune
from imagerag.registry.takedown import sweep_models
from imagerag.registry.versions import THE_GATE, list_versions, register
from imagerag.retrieval.schema import ID
from imagerag.settings import DEFAULT_MODEL_NAME
from imagerag.training.tracking import start_run
from tests.registry.conftest import NAME, Home


def folder_of(home: Home, version: int) -> Path:
    """Where MLflow has a version's files."""
    return Path(home.client.get_model_version_download_uri(DEFAULT_MODEL_NAME, str(version)).removeprefix("file://"))


def numbers(home: Home) -> list[int]:
    return [info.version for info in list_versions(home.settings)]


def test_what_people_rolled_back_and_what_others_made_is_not_pruned(home: Home) -> None:
    settings, gate = home.settings, {"reason": "better", "author": THE_GATE}
    for name, over in (("first", None), ("second", 1)):
        promote(settings, register(home.finetuned(name), settings).version, **gate, over=over)
    rollback(settings, reason="too dark", author="ada")
    home.client.create_model_version(DEFAULT_MODEL_NAME, str(home.base))
    register(home.finetuned("first"), settings)
    assert [info.aliases for info in list_versions(settings)] == [(), (), ("candidate", "champion")]
    assert prune(settings, keep=0) == []
    assert numbers(home) == [3, 2, 1]


def test_a_registration_that_was_killed_leaves_no_files_behind(home: Home) -> None:
    """It had uploaded them, and made no version of them."""
    first = register(home.finetuned("first"), home.settings)
    home.client.delete_registered_model_alias(DEFAULT_MODEL_NAME, "candidate")
    home.client.delete_model_version(DEFAULT_MODEL_NAME, str(first.version))
    assert register(home.finetuned("first"), home.settings).is_new
    run = home.client.get_run(first.run_id)
    assert len(home.client.search_logged_models([run.info.experiment_id])) == 1


@pytest.fixture
def evaluations(home: Home, tmp_path: Path) -> list[str]:
    """Evaluations of a version each, with its pictures; the third version is portable, and nobody evaluated it."""
    grid = tmp_path / "pictures.png"
    Image.new("RGB", (8, 8)).save(grid)
    runs = [start_run(home.settings, "evaluate", name, {}) for name in ("e1", "e2")]
    for name, run in zip(("first", "second"), runs, strict=True):
        register(home.finetuned(name), home.settings, grid=grid, evaluation_run=run)
    register(home.finetuned("second"), home.settings, portable=True)
    return runs


def test_a_takedown_leaves_what_does_not_show_the_image(home: Home, evaluations: list[str], tmp_path: Path) -> None:
    """And an evaluation whose run MLflow has lost is no reason to stop."""
    elsewhere = pa.array([b"of an image that left"[:20]], ID)
    swept = sweep_models(home.settings, NAME, elsewhere, ["0" * 32, evaluations[0]], [])
    assert swept.deleted == ("imagerag-turbo 1: grid.png",)
    assert [(folder_of(home, version) / "grid.png").exists() for version in (1, 2)] == [False, True]
    assert numbers(home) == [3, 2, 1]
    download(home.settings, 1, tmp_path / "still usable")


def test_a_takedown_deletes_the_pictures_of_trainings_that_were_deleted(home: Home) -> None:
    client, runs = home.client, dict[str, str]()
    for table in ("references-a.lance", "references-b.lance"):
        runs[table] = start_run(home.settings, "finetune", table, {}, {"references_uri": f"/training/{table}"})
        client.log_text(runs[table], "a picture", "validation/000001.png")
    client.delete_run(runs["references-a.lance"])
    swept = sweep_models(home.settings, NAME, home.store.ids()[:1].combine_chunks(), [], ["references-a.lance"])
    assert swept.deleted == (f"MLflow run {runs['references-a.lance']}: validation",)
    left = Path(client.get_run(runs["references-b.lance"]).info.artifact_uri.removeprefix("file://"))
    assert (left / "validation" / "000001.png").is_file()
