"""Versions of the model in a real MLflow: what they pin, which one is used, and which ones are refused."""

import json
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from imagerag.artifacts import CachedFeatures, Registered
from imagerag.cli import app
from imagerag.errors import UserError
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.registry import package
from imagerag.registry.champion import champions_behind, present_champion
from imagerag.registry.fetch import download, pull
from imagerag.registry.health import check_versions
from imagerag.registry.promotion import promote
from imagerag.registry.removal import prune
from imagerag.registry.removal import remove as remove_model
from imagerag.registry.versions import (
    THE_GATE,
    list_versions,
    register,
    resolve_version,
    versions_of_index,
)
from imagerag.retrieval.pins import pins
from imagerag.retrieval.publish import PublishConfig
from imagerag.retrieval.takedown import remove_rows
from imagerag.settings import DEFAULT_MODEL_NAME, Settings
from imagerag.training.tracking import start_run, tracking_uri
from tests.registry.conftest import NAME, Home
from tests.retrieval.rows import append, index_and_publish, make_rows

WHY = {"reason": "it is better", "author": "somebody"}


def of_alias(home: Home) -> dict[str, int]:
    return {alias: info.version for info in list_versions(home.settings) for alias in info.aliases}


def publish_more(home: Home) -> int:
    """Publish another version, and keep none before it."""
    start = 100 + home.store.count()
    append(home.store, make_rows(start, start + 1, home.store.encoder))
    home.publish()
    return index_and_publish(home.store, PublishConfig(keep=1)).version or 0


def test_a_version_pins_all_that_its_pictures_depend_on(champion: Home, tmp_path: Path) -> None:
    info = resolve_version(champion.settings, "champion")
    finetuned = champion.finetuned("first")
    assert (info.version, info.run_id, info.portable) == (1, finetuned.run_id, False)
    assert info.tags["gate"] == "passed"
    assert (info.tags["imagerag.promoted_by"], info.tags["imagerag.reason"]) == ("somebody", "it is better")
    manifest = package.read(download(champion.settings, 1, tmp_path / "model"))
    assert (manifest.base, manifest.base_digest) == (str(champion.base), finetuned.base_digest)
    assert (manifest.index_uri, manifest.index_name) == (champion.settings.index_uri, NAME)
    assert (manifest.index_version, manifest.encoder_digest) == (champion.store.version, champion.store.encoder.digest)
    assert (manifest.training, manifest.run_id) == ("first", finetuned.run_id)
    assert manifest.packages.keys() >= {"imagerag-turbo", "torch", "diffusers", "pylance"}
    assert {path.split("/")[0] for path in manifest.files} == {"adapter", "lora"}
    assert all("==" in each and "+" not in each for each in manifest.requirements)
    assert f"imagerag-turbo=={manifest.packages['imagerag-turbo']}" in manifest.requirements
    assert not any(each.startswith("imagerag") for each in replace(manifest, portable=True).requirements)

    folder = tmp_path / "model"
    assert (folder / "requirements.txt").read_text().splitlines() == manifest.requirements
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert yaml.safe_load((folder / "python_env.yaml").read_text()) == {
        "python": python,  # whichever patch release a machine has
        "dependencies": ["-r requirements.txt"],  # and no pip and setuptools that are in no folder of their wheels
    }
    example = json.loads((folder / "serving_input_example.json").read_text())
    assert example["dataframe_split"] == {"columns": ["prompt"], "data": [["a red dragon"]]}
    assert example["params"] == {"seed": 0, "num_images": 1}
    card = (folder / "README.md").read_text()
    for part in (
        "| metric | value |",
        "![Pictures of each prompt](grid.png)",
        r"| even | CC0\-1\.0 | 4 |",
        "## Limits",
    ):
        assert part in card, part
    assert (folder / "grid.png").is_file()
    described = champion.client.get_model_version(DEFAULT_MODEL_NAME, "1").description
    assert described.startswith("Registered by [a flow run](http://prefect/run).\n\n# ImageRAGTurbo")
    assert "\nPictures of each prompt: `grid.png` among the artifacts" in described
    assert "![" not in described, "it can't show them"


def test_a_version_leads_to_its_run_and_its_data(champion: Home) -> None:
    run = champion.client.get_run(champion.finetuned("first").run_id)
    (named,) = run.inputs.dataset_inputs
    source = json.loads(named.dataset.source)
    assert source == {"uri": champion.store.table_uri, "version": champion.store.version}
    assert {tag.value for tag in named.tags} == {"training"}


def test_a_version_its_training_and_its_evaluation_lead_to_each_other(home: Home) -> None:
    client, training = home.client, home.finetuned("first").run_id
    evaluation = start_run(home.settings, "evaluate", "e1", {})
    for key, value in {"adapter/recognised": 0.5, "base/recognised": 0.1}.items():
        client.log_metric(evaluation, key, value)
    for _ in range(2):
        register(home.finetuned("first"), home.settings, evaluation_run=evaluation)
    info = resolve_version(home.settings, "1")
    assert info.pinned("evaluation_run") == evaluation
    model = client.get_logged_model(info.pinned("logged_model"))
    assert (model.source_run_id, model.status, model.params["training"]) == (training, "READY", "first")
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "imagerag-turbo", "version": 1}]
    assert {metric.key: metric.value for metric in model.metrics} == {"adapter/recognised": 0.5}
    assert [each.model_id for each in client.get_run(training).outputs.model_outputs] == [model.model_id]
    assert [each.model_id for each in client.get_run(evaluation).inputs.model_inputs] == [model.model_id]

    client.delete_registered_model_alias("imagerag-turbo", "candidate")
    remove_model(home.settings, 1)
    assert client.search_logged_models([model.experiment_id]) == []
    assert register(home.finetuned("first"), home.settings, evaluation_run="0" * 32).is_new, "its run may be lost"


def test_the_same_content_is_one_version(home: Home) -> None:
    first, again = (register(home.finetuned("first"), home.settings) for _ in range(2))
    assert (first.version, first.is_new, first.uri) == (1, True, "models:/imagerag-turbo/1")
    assert again == replace(first, is_new=False)
    portable = [register(home.finetuned("first"), home.settings, portable=True) for _ in range(2)]
    assert [(each.version, each.is_new) for each in portable] == [(2, True), (2, False)]
    assert of_alias(home) == {"candidate": 2}
    assert register(home.finetuned("first"), home.settings) == again
    assert of_alias(home) == {"candidate": 1}


def test_models_of_different_names_have_a_champion_each(home: Home, tmp_path: Path) -> None:
    """The same content under two names is a version of each; what concerns the index concerns both."""
    mugs = Settings(home=home.settings.home, model_name="mugs")
    for settings in (home.settings, mugs):
        register(home.finetuned("first"), settings)
    registered = register(home.finetuned("second"), mugs)
    assert (registered.version, registered.uri) == (2, "models:/mugs/2")
    promote(mugs, 2, **WHY)
    promote(home.settings, 1, **WHY)
    assert of_alias(home) == {"candidate": 1, "champion": 1}
    assert resolve_version(mugs, "champion").version == 2
    candidate = home.finetuned("second")
    assert present_champion(mugs, candidate) is None, "it would be the champion itself"
    assert present_champion(home.settings, candidate).version == 1

    used = [(info.name, info.version) for info in versions_of_index(mugs, NAME)]
    assert used == [("imagerag-turbo", 1), ("mugs", 2), ("mugs", 1)]
    assert {info.name for info, fault in check_versions(mugs) if fault is None} == {"imagerag-turbo", "mugs"}
    cached = CachedFeatures(
        uri=home.settings.index_uri, table=NAME, version=99, num_rows=4, num_added=0, base_id=str(home.base),
        fit="auto", features_digest=resolve_version(mugs, "2").pinned("features_digest"),
    )  # fmt: skip
    behind = {name: adapter.rsplit("/", 1)[-1] for name, adapter in champions_behind(mugs, cached, 99)}
    assert behind == {"imagerag-turbo": "first", "mugs": "second"}

    assert len(pins(home.store)) == 3
    (removed,) = prune(mugs, keep=0)
    assert removed.version == 1
    assert len(pins(home.store)) == 2
    pull(home.settings, "champion", tmp_path / "pulled")


def test_versions_that_nobody_named_are_removed_with_what_they_keep(home: Home) -> None:
    settings = home.settings
    first = home.store.version
    for name in ("first", "second"):
        register(home.finetuned(name), settings)
    promote(settings, 1, reason="better", author=THE_GATE)
    promote(settings, 2, **WHY)
    promote(settings, 1, reason="better", author=THE_GATE, over=2)
    home.client.delete_registered_model_alias(DEFAULT_MODEL_NAME, "previous")
    second = publish_more(home)
    for name in ("first", "second"):
        register(home.finetuned(name), settings)
    with pytest.raises(UserError, match=r"version 1 of imagerag-turbo is champion, which others ask for"):
        remove_model(settings, 1)
    assert of_alias(home) == {"candidate": 4, "champion": 1}
    assert prune(settings, keep=1) == []
    (removed,) = prune(settings, keep=0)
    assert removed.version == 3, "1 and 4 have aliases, and a person promoted 2"
    assert removed.num_bytes > 10_000
    assert removed.index == f"{second} of 'images'"
    assert [info.version for info in list_versions(settings)] == [4, 2, 1]
    assert sorted(pins(home.store).values()) == [first, first, second]
    run = home.client.get_run(home.finetuned("first").run_id)
    assert len(home.client.search_logged_models([run.info.experiment_id])) == 3

    home.client.delete_registered_model_alias(DEFAULT_MODEL_NAME, "candidate")
    assert remove_model(settings, 4).version == 4
    publish_more(home)
    assert not home.store.has(second)
    assert home.store.has(first)


def test_a_run_that_names_no_number_keeps_as_many_versions_as_the_last_that_did(home: Home) -> None:
    """Those that an automation starts, for one."""
    settings = home.settings
    assert prune(settings, keep=None) == [], "nothing is registered"
    register(home.finetuned("first"), settings)
    assert prune(settings, keep=0) == [], "it is the candidate"
    register(home.finetuned("second"), settings)
    (removed,) = prune(settings, keep=None)
    assert removed.version == 1


def test_two_registrations_at_once(home: Home) -> None:
    made: list[Registered] = []
    names = ("first", "second", "first")
    threads = [
        threading.Thread(target=lambda name=name: made.append(register(home.finetuned(name), home.settings)))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((each.version, each.is_new) for each in made) in (
        [(1, False), (1, True), (2, True)], [(1, True), (2, False), (2, True)],
    )  # fmt: skip
    assert of_alias(home) == {"candidate": made[-1].version}
    assert set(pins(home.store).values()) == {home.store.version}
    assert len(pins(home.store)) == 2


def test_a_version_shows_its_last_evaluation(home: Home) -> None:
    settings, own = home.settings, home.finetuned("first")
    for gate, results in (("failed", "the first"), ("passed", "the last")):
        made = register(own, settings, results=results, evaluation_run=own.run_id, tags={"imagerag.gate": gate})
        assert not made.is_champion
    info = resolve_version(settings, "1")
    assert info.tags["imagerag.gate"] == "passed"
    assert info.tags["imagerag.evaluation_run"] == own.run_id
    text = home.client.get_model_version(DEFAULT_MODEL_NAME, "1").description
    assert "the last" in text
    assert "the first" not in text
    promote(settings, 1, **WHY)
    assert register(own, settings).is_champion
    assert resolve_version(settings, "1").tags["imagerag.gate"] == "passed"
    assert home.client.get_model_version(DEFAULT_MODEL_NAME, "1").description == text
    home.client.delete_model_version_tag(DEFAULT_MODEL_NAME, "1", "imagerag.logged_model")  # as of an earlier release
    register(own, settings, results="| metric | value |\n" * 500, evaluation_run=own.run_id)
    text = home.client.get_model_version(DEFAULT_MODEL_NAME, "1").description
    assert (len(text), text[-1]) == (5_000, "…"), "MLflow has no room for more"
    (measured,) = home.client.get_run(own.run_id).inputs.model_inputs
    assert measured.model_id == info.pinned("logged_model")


def test_the_pinned_index_outlives_later_publications_but_no_takedown(home: Home, tmp_path: Path) -> None:
    version = home.store.version
    register(home.finetuned("first"), home.settings)
    now = publish_more(home)
    assert register(home.finetuned("first"), home.settings).version == 2
    assert register(home.finetuned("first"), home.settings, index_version=version).version == 1
    assert package.load(download(home.settings, 1, tmp_path / "old")).index.retriever.version == version

    removal = remove_rows(home.store, urls=["https://example.org/3.png"])
    first, second = removal.pinned_by
    assert (first[:17], second[:17]) == ("imagerag-turbo-1-", "imagerag-turbo-2-")
    published = home.store.version
    expected = rf"version {version} of the index 'images' .* not to be had: version {published} is published now"
    with pytest.raises(UserError, match=expected):
        pull(home.settings, "1", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    with pytest.raises(UserError, match=rf"version {now} of the index"):
        register(home.finetuned("first"), home.settings, index_version=now)


def test_each_version_fits_pictures_as_its_own_index_does(home: Home, tmp_path: Path) -> None:
    register(home.finetuned("first"), home.settings)
    home.publish("crop")
    register(home.finetuned("first"), home.settings, portable=True)
    for version, fit in (1, "auto"), (2, "crop"):
        folder = download(home.settings, version, tmp_path / str(version))
        identity = package.load(folder).index.identity
        assert (identity.fit, identity.digest) == (fit, package.read(folder).features_digest)
    pull(home.settings, "2", tmp_path / "pulled")
    assert ImageRAGTurboPipeline.from_pretrained(tmp_path / "pulled").index.identity == identity
    inputs = home.client.get_run(home.finetuned("first").run_id).inputs.dataset_inputs
    versions = {tag.value: json.loads(each.dataset.source)["version"] for each in inputs for tag in each.tags}
    assert versions == {"training": home.finetuned("first").index_version, "retrieval": home.store.version}


def test_a_training_whose_run_was_lost_has_another(home: Home) -> None:
    lost = replace(home.finetuned("first"), run_id="0" * 32)
    first, again = (register(lost, home.settings) for _ in range(2))
    assert (first.version, again.version) == (1, 1)
    run = home.client.get_run(first.run_id)
    assert run.data.tags["imagerag.continues"] == lost.run_id
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")


def test_a_home_can_be_moved(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its models, the portable one by `models:/` too; `doctor` says what can't be had."""
    import mlflow

    register(home.finetuned("first"), home.settings)
    register(home.finetuned("first"), home.settings, portable=True)
    promote(home.settings, 1, **WHY)
    version = home.store.version
    settings = Settings(home=tmp_path / "moved to" / "another place")
    settings.home.parent.mkdir()
    home.settings.home.rename(settings.home)
    monkeypatch.setenv("IMAGERAG_HOME", str(settings.home))

    champion, portable = resolve_version(settings, "champion"), resolve_version(settings, "2")
    assert champion.pinned("index_uri") == settings.index_uri
    assert [fault for _, fault in check_versions(settings)] == [None, None]
    assert package.load(download(settings, 1, tmp_path / "fetched")).index.retriever.version == version
    pull(settings, str(portable.version), tmp_path / "pulled")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(settings))
    loaded = mlflow.pyfunc.load_model("models:/imagerag-turbo/2")
    (row,) = loaded.predict([{"prompt": "a castle"}], params={"seed": 7})
    assert row["references"]
    assert not home.settings.home.exists(), "nothing was made at the former place"
    assert register(home.finetuned("first"), settings).version == 1, "the same content, wherever it is"

    shutil.rmtree(settings.index_uri)
    assert [fault for _, fault in check_versions(settings)] == [
        None,
        f"version {version} of its index 'images' is gone",
    ]
    shutil.rmtree(settings.home / "mlflow" / "artifacts")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "its files are not in" in " ".join(result.output.split())


def test_an_index_that_was_made_anew_is_another_one(home: Home, tmp_path: Path) -> None:
    register(home.finetuned("first"), home.settings)
    manifest = package.read(download(home.settings, 1, tmp_path / "model"))
    other = home.store.copy(manifest.index_version, str(tmp_path / "other"))
    shutil.rmtree(home.store.table_uri)
    with pytest.raises(UserError, match="there is no such table"):
        pull(home.settings, "1", tmp_path / "pulled")
    shutil.move(other.table_uri, home.store.table_uri)
    with pytest.raises(UserError, match="is not the pinned one: it was made"):
        pull(home.settings, "1", tmp_path / "pulled")


def test_what_is_not_there(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_versions(home.settings) == []
    with pytest.raises(UserError, match="no version of imagerag-turbo is registered yet; asked for 'champion'"):
        pull(home.settings, "champion", tmp_path / "pulled")
    finetuned = home.finetuned("first")
    register(finetuned, home.settings)
    with pytest.raises(UserError, match="no version or alias 'best'; versions: 1; aliases: candidate"):
        resolve_version(home.settings, "best")
    with pytest.raises(UserError, match="no version or alias '7'"):
        promote(home.settings, 7, **WHY)
    with pytest.raises(UserError, match=r"is there already, and nothing is overwritten"):
        pull(home.settings, "1", home.base)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    unreachable = Settings(home=home.settings.home, mlflow_tracking_uri="http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"MLflow at http://127.0.0.1:9 can't be used"):
        list_versions(unreachable)


def test_what_does_not_fit_is_not_registered(home: Home) -> None:
    finetuned = home.finetuned("first")
    with pytest.raises(UserError, match=rf"base model of digest {'0' * 64}; .* has the digest {finetuned.base_digest}"):
        register(replace(finetuned, base_digest="0" * 64), home.settings)
    with pytest.raises(UserError, match=r"the index has cached features for .*, and none for tiny"):
        register(replace(finetuned, base="tiny", base_digest=_digest_of_tiny()), home.settings)
    (Path(finetuned.uri) / "lora" / "optimizer.pt").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"trained weights are safetensors, .*optimizer.pt is neither"):
        register(finetuned, home.settings)
    with pytest.raises(UserError, match=r"there is no .*/nowhere/adapter"):
        register(replace(finetuned, uri="/nowhere"), home.settings)
    assert list_versions(home.settings) == []


def _digest_of_tiny() -> str:
    from imagerag.base.files import resolve

    return resolve("tiny").identity.digest
