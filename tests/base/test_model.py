import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from imagerag.base.files import check_spec, resolve
from imagerag.base.model import load_base
from imagerag.embedded import tiny_base
from imagerag.errors import UserError
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.storage.digests import sha256_of as digests_sha256_of

PROMPTS = ["a fox", "two slices of watermelon"]
FORMATS = ["sd-turbo", "sd-2-teacher", "fp16-only", "sharded", "sdxl-turbo", "lcm"]


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(2)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_and_makes_pictures(bases: dict[str, Path], name: str) -> None:
    base = load_base(str(bases[name]), device="cpu")
    assert base.identity.id == str(bases[name])
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())
    images = ImageRAGTurboPipeline.from_base(base)(PROMPTS, generator=_generators(), output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()
    assert images.std() > 0.01


@pytest.mark.parametrize(
    ("name", "peer", "steps", "guidance"),
    [
        ("sd-turbo", StableDiffusionPipeline, 1, 0.0),
        ("sd-turbo", StableDiffusionPipeline, 4, 0.0),
        ("sd-2-teacher", StableDiffusionPipeline, 3, 5.0),
        ("sdxl-turbo", StableDiffusionXLPipeline, 1, 0.0),
        ("sdxl-turbo", StableDiffusionXLPipeline, 3, 5.0),
        ("lcm", StableDiffusionPipeline, 2, 8.0),
    ],
)
def test_pictures_are_those_of_diffusers(
    bases: dict[str, Path], name: str, peer: type[StableDiffusionPipeline], steps: int, guidance: float
) -> None:
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    theirs = peer.from_pretrained(bases[name])
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(PROMPTS, generator=_generators(), **arguments).images
    ours = ImageRAGTurboPipeline.from_base(load_base(str(bases[name]), device="cpu"))
    found = ours(PROMPTS, generator=_generators(), **arguments).images
    assert abs(found - expected).max() < 1e-4


def test_the_digest_is_of_the_content(bases: dict[str, Path], tmp_path: Path) -> None:
    first = resolve(str(bases["sd-turbo"])).identity
    copy = shutil.copytree(bases["sd-turbo"], tmp_path / "copy")
    assert resolve(str(copy)).identity.digest == first.digest
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 8', '"sample_size": 16'))
    assert resolve(str(copy)).identity.digest != first.digest
    assert resolve(str(bases["sd-2-teacher"])).identity.digest != first.digest


def test_a_large_files_digest_is_remembered_until_it_changes(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("imagerag.storage.digests._LARGE_BYTES", 1000)
    copy = shutil.copytree(bases["sd-turbo"], tmp_path / "copy")
    first = resolve(str(copy)).identity

    hashed: list[Path] = []

    def sha256_of(path: Path) -> str:
        hashed.append(path)
        return digests_sha256_of(path)

    monkeypatch.setattr("imagerag.storage.digests.sha256_of", sha256_of)
    assert resolve(str(copy)).identity == first
    assert not any(path.suffix == ".safetensors" for path in hashed)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert resolve(str(copy)).identity != first
    assert weights in hashed


def test_a_base_model_names_its_weight_in_slerp(bases: dict[str, Path], tmp_path: Path) -> None:
    assert resolve("tiny").slerp_w == load_base("tiny", "cpu").slerp_w == tiny_base.SLERP_W
    assert resolve(str(bases["sd-turbo"])).slerp_w == 0.8, "the paper's"
    copy = shutil.copytree(bases["sd-turbo"], tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"slerp_w": 0.1}))
    assert load_base(str(copy), "cpu").slerp_w == 0.1
    for wrong in (2, "0.2", None):
        (copy / "model_index.json").write_text(json.dumps(index | {"slerp_w": wrong}))
        with pytest.raises(UserError, match=rf"is between -1 and 1; .*model_index.json says {wrong!r}"):
            resolve(str(copy))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stabilityai/sd-turbo", r"pinned by a full commit, as in `stabilityai/sd-turbo@.*got 'stabilityai/sd-turbo'"),
        ("stabilityai/sd-turbo@main", r"a base model is `tiny`.*got 'stabilityai/sd-turbo@main'"),
        ("sd turbo", r"a base model is `tiny`.*got 'sd turbo'"),
        ("", r"a base model is `tiny`.*got ''"),
    ],
)
def test_a_spec_has_one_of_the_forms(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_spec(spec)


def _without(folder: Path, path: str) -> None:
    target = folder / path
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def _pickled(folder: Path, path: str) -> None:
    (folder / path).rename((folder / path).with_suffix(".bin"))


def _other_class(folder: Path, path: str) -> None:
    config = json.loads((folder / path).read_text())
    config["_class_name"] = "UNet3DConditionModel"
    (folder / path).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        (_without, "model_index.json", r"folder has model_index.json, in diffusers' format; .*/copy has none"),
        (_without, "vae", r"model_index.json lists vae, but there is no folder .*/copy/vae"),
        (_without, "scheduler/scheduler_config.json", r"scheduler has no .*/scheduler_config.json"),
        (_without, "unet/config.json", r"unet has no .*/unet/config.json"),
        (
            _without,
            "unet/diffusion_pytorch_model.safetensors",
            r"the unet has no weights: .*/unet/diffusion_pytorch_model.safetensors does not exist",
        ),
        (
            _pickled,
            "text_encoder/model.safetensors",
            r"text_encoder's weights are .*/text_encoder/model.bin, a pickle.*so that there is model.safetensors",
        ),
        (_other_class, "unet/config.json", r"unet is a UNet2DConditionModel; .* says 'UNet3DConditionModel'"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(
    bases: dict[str, Path], tmp_path: Path, change: object, path: str, message: str
) -> None:
    copy = shutil.copytree(bases["sd-turbo"], tmp_path / "copy")
    change(copy, path)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        load_base(str(copy), device="cpu")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model_index.json", r"model_index.json has to be JSON"),
        ("vae/config.json", r"vae/config.json has to be JSON"),
        ("text_encoder/config.json", r"text_encoder/config.json has to be JSON"),
        ("scheduler/scheduler_config.json", r"scheduler_config.json has to be JSON"),
        ("unet/diffusion_pytorch_model.safetensors", r"the weights in .*/copy/unet can't be loaded"),
        ("text_encoder/model.safetensors", r"the weights in .*/copy/text_encoder can't be loaded"),
    ],
)
def test_a_file_that_was_cut_off_is_named(bases: dict[str, Path], tmp_path: Path, path: str, message: str) -> None:
    copy = shutil.copytree(bases["sd-turbo"], tmp_path / "copy")
    (copy / path).write_bytes((copy / path).read_bytes()[:100])
    with pytest.raises(UserError, match=message):
        load_base(str(copy), device="cpu")


def test_a_unet_without_a_mid_block_is_named_before_anything_is_loaded(bases: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(bases["sd-turbo"], tmp_path / "copy")
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(copy / "unet"), mid_block_type=None)
    unet.save_pretrained(copy / "unet")
    with pytest.raises(UserError, match=r"fused into the output of the UNet's mid block, .*mid_block_type is None"):
        ImageRAGTurboPipeline.from_pretrained(copy)
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"fused into the output of the UNet's mid block, .*mid_block_type is None"):
        load_base(str(copy), device="cpu")


def test_a_missing_shard_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(bases["sharded"], tmp_path / "copy")
    shard = sorted((copy / "unet").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"lists {shard.name}, which is not in {shard.parent}"):
        resolve(str(copy))


def test_a_model_out_of_reach_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec = f"stabilityai/sd-turbo@{'0' * 40}"
    with pytest.raises(UserError, match=f"{spec} is not on this machine and could not be downloaded"):
        load_base(spec)
