import shutil
from pathlib import Path

import pytest

from imagerag.base.files import resolve as resolve_base
from imagerag.embedding.encoder_files import check_spec, resolve
from imagerag.errors import UserError
from tests.embedding.conftest import write_encoder

COMMIT = "1234567890abcdef1234567890abcdef12345678"


@pytest.mark.parametrize(
    "spec", ["tiny", "ViT-B-32/laion2b_s34b_b79k", f"hf-hub:org/name@{COMMIT}", "./folder", "~/folder"]
)
def test_all_forms_are_recognised(spec: str) -> None:
    assert check_spec(spec) == spec


@pytest.mark.parametrize(
    "spec", ["hf-hub:org/name", "hf-hub:org/name@main", "hf-hub:org/name@1234567", f"hf-hub:{COMMIT}"]
)
def test_a_hub_id_must_be_pinned(spec: str) -> None:
    with pytest.raises(UserError, match=r"pinned by a full commit.*got 'hf-hub:"):
        check_spec(spec)


@pytest.mark.parametrize("spec", ["", "ViT-B-32", "a/b/c", "two words/tag"])
def test_other_forms_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="an encoder is `tiny`, an open_clip name") as refused:
        check_spec(spec)
    assert str(refused.value).endswith(f"got {spec!r}")


def test_unknown_models_and_tags_are_refused() -> None:
    with pytest.raises(UserError, match="no pretrained model named 'ViT-B-33', as asked for by 'ViT-B-33/openai'"):
        resolve("ViT-B-33/openai")
    with pytest.raises(UserError, match=r"'ViT-B-32' has no pretrained tag 'laion3b'; it has .*laion2b_s34b_b79k"):
        resolve("ViT-B-32/laion3b")


def test_a_folder_must_be_complete(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"encoder folder {tmp_path}/absent does not exist"):
        resolve(f"{tmp_path}/absent")
    with pytest.raises(UserError, match=f"has open_clip_config.json.*; {tmp_path} has none"):
        resolve(str(tmp_path))
    shutil.copy(encoder_folder / "open_clip_config.json", tmp_path)
    with pytest.raises(UserError, match=f"in open_clip_model.safetensors; {tmp_path} has none"):
        resolve(str(tmp_path))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=f"has {tmp_path}/open_clip_pytorch_model.bin, a pickle"):
        resolve(str(tmp_path))


def test_the_digest_is_of_the_content(encoder_folder: Path, tmp_path: Path) -> None:
    identity = resolve(str(encoder_folder)).identity
    assert identity.dim == 16
    copied = shutil.copytree(encoder_folder, tmp_path / "copy")
    assert resolve(str(copied)).identity.digest == identity.digest
    config = copied / "open_clip_config.json"
    config.write_text(config.read_text().replace("0.5", "0.4"))
    assert resolve(str(copied)).identity.digest != identity.digest
    assert resolve(str(write_encoder(tmp_path / "two", seed=1))).identity.digest != identity.digest


def test_a_folder_called_tiny_is_not_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "tiny-teacher"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny").identity.id == "tiny"
    assert resolve_base("tiny").identity.id == "tiny"
    assert resolve_base("tiny-teacher").identity.id == "tiny-teacher"
