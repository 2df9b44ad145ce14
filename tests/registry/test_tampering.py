"""Registered models that somebody changed, or that are not ours, are not used."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from imagerag.errors import UserError
from imagerag.registry import package
from imagerag.registry.fetch import download, pull, pull_served
from imagerag.registry.promotion import promote
from imagerag.registry.versions import CODE_TAG, VersionInfo, list_versions, register
from imagerag.settings import DEFAULT_MODEL_NAME
from tests.registry.conftest import Home

WHY = {"reason": "it is better", "author": "somebody"}


def _change_weights(model: Path) -> None:
    weights = model / "artifacts/package/adapter/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def _change_weights_and_manifest(model: Path) -> None:
    _change_weights(model)
    path = model / "artifacts/package/imagerag.json"
    manifest = json.loads(path.read_text())
    changed = model / "artifacts/package/adapter/diffusion_pytorch_model.safetensors"
    manifest["files"]["adapter/diffusion_pytorch_model.safetensors"] = hashlib.sha256(changed.read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))


def _remove_weights(model: Path) -> None:
    (model / "artifacts/package/adapter/diffusion_pytorch_model.safetensors").unlink()


def _add_file(model: Path) -> None:
    (model / "artifacts/package/adapter/more.json").write_text("{}")


def _add_pickle(model: Path) -> None:
    (model / "python_model.pkl").write_bytes(b"not even read")


def _name_pickle(model: Path) -> None:
    described = (model / "MLmodel").read_text()
    (model / "MLmodel").write_text(described.replace("model_code_path: ", "python_model: "))


def _change_code(model: Path) -> None:
    code = model / "model_code.py"
    code.write_text(code.read_text() + "import os\n")


def _name_code(model: Path) -> None:
    described = (model / "MLmodel").read_text()
    (model / "MLmodel").write_text(described.replace("model_code.py", "more.py"))


def _require_more(model: Path) -> None:
    (model / "requirements.txt").write_text("requests\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change_code, r"what MLflow runs of the model .* was changed after the model was registered"),
        (_name_code, r"what MLflow runs of the model"),
        (_require_more, r"what MLflow runs of the model"),
        (_change_weights, r"adapter/diffusion_pytorch_model.safetensors was changed after the model was registered"),
        (_change_weights_and_manifest, r"imagerag.json was changed after the model was registered: .* tag says"),
        (_remove_weights, r"model.safetensors was changed .*: its SHA-256 is that of no file"),
        (_add_file, r"adapter/more.json was changed .* the manifest says nothing"),
        (_add_pickle, r"the model has python_model.pkl, a pickle"),
        (_name_pickle, r"the model's code is a pickle"),
    ],
)
def test_what_was_changed_is_not_used(home: Home, tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    register(home.finetuned("second"), home.settings)
    change(Path(home.client.get_model_version(DEFAULT_MODEL_NAME, "1").source.removeprefix("file://")))
    with pytest.raises(UserError, match=message):
        pull(home.settings, "1", tmp_path / "out" / "pulled")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_version_that_others_made_is_not_used(home: Home, tmp_path: Path) -> None:
    client = home.client
    client.create_registered_model(DEFAULT_MODEL_NAME)
    client.create_model_version(DEFAULT_MODEL_NAME, str(home.base))
    for use in (lambda: pull(home.settings, "1", tmp_path / "pulled"), lambda: promote(home.settings, 1, **WHY)):
        with pytest.raises(UserError, match=r"version 1 of imagerag-turbo has no tag imagerag.manifest"):
            use()
    assert [info.signed for info in list_versions(home.settings)] == [False]
    assert isinstance(list_versions(home.settings)[0], VersionInfo)


def test_another_base_model_at_the_same_place_is_refused(home: Home, tmp_path: Path) -> None:
    register(home.finetuned("second"), home.settings)
    folder = download(home.settings, 1, tmp_path / "model")
    manifest = package.read(folder)
    moved = tmp_path / "base"
    shutil.copytree(home.base, moved)
    config = moved / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"v_prediction"', '"epsilon"'))
    package._write(folder, replace(manifest, base_id=str(moved)))
    with pytest.raises(UserError, match=rf"base model of digest {manifest.base_digest}; {moved} has the digest"):
        package.load(folder)


def test_features_that_this_release_does_not_make_are_refused(home: Home, tmp_path: Path) -> None:
    """The pictures would be others, and nothing else would tell."""
    register(home.finetuned("second"), home.settings)
    folder = download(home.settings, 1, tmp_path / "model")
    package._write(folder, replace(package.read(folder), features_digest="0" * 64))
    with pytest.raises(UserError, match=rf"features of digest {'0' * 64}; .* use imagerag-turbo \d"):
        package.load(folder)


def test_a_version_without_a_digest_of_its_code_is_not_served(home: Home, tmp_path: Path) -> None:
    """As early releases registered it."""
    register(home.finetuned("second"), home.settings)
    home.client.delete_model_version_tag(DEFAULT_MODEL_NAME, "1", CODE_TAG)
    with pytest.raises(UserError, match=r"version 1 of imagerag-turbo has no tag imagerag\.code"):
        pull_served(home.settings, "1", tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_what_loading_it_in_place_leaves_is_no_change(home: Home, tmp_path: Path) -> None:
    """As `mlflow.pyfunc.load_model` does where the store is a folder."""
    register(home.finetuned("second"), home.settings)
    model = Path(home.client.get_model_version(DEFAULT_MODEL_NAME, "1").source.removeprefix("file://"))
    (model / "registered_model_meta").write_text(f"model_name: {DEFAULT_MODEL_NAME}")
    (model / "__pycache__").mkdir()
    (model / "__pycache__" / "model_code.cpython-311.pyc").write_bytes(b"never checked, so never used")
    folder = download(home.settings, 1, tmp_path / "model")
    assert package.read(folder).training == home.finetuned("second").name
    assert not (tmp_path / "model" / "registered_model_meta").exists()
    assert not (tmp_path / "model" / "__pycache__").exists()
