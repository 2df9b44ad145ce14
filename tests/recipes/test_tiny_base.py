"""The whole recipe, with a few drawings and steps."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from imagerag.embedded import tiny_base
from imagerag.embedded.sample import Drawing, load_drawings
from imagerag.errors import UserError
from imagerag.recipes.tiny_base.anything import Cutouts
from imagerag.recipes.tiny_base.data import Pictures
from imagerag.recipes.tiny_base.latents import Latents
from imagerag.recipes.tiny_base.teacher import build_unet, deepened
from imagerag.recipes.tiny_base.train import Recipe, Training
from imagerag.recipes.tiny_base.vae import VaePhase, build_vae, encode_all, encode_halved, enlarged
from imagerag.storage.digests import sha256_of
from tests.recipes.test_loop import Kept as _Kept

RECIPE = Recipe(
    vae_steps=2, hspace_steps=2, prior_steps=2, teacher_steps=2, student_steps=2, perceptual_steps=2, batch_size=8
)
PARTS = ["vae", "teacher", "unet", "perceptual"]


class Kept(_Kept):
    def metrics(self, values: object, step: int) -> None:
        pass


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return load_drawings(styles=["noto", "twemoji"], splits=["base"])[::120]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few PNG files of anything."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(256, size=(40, 30 + number, 4), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def _weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {part: load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in PARTS}


def test_it_makes_all_parts_and_a_killed_run_goes_on(
    drawings: list[Drawing], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagerag.recipes.tiny_base.prior._NUM_NOISES", 32)
    monkeypatch.setattr("imagerag.recipes.loop._GRIDS", 1)
    monkeypatch.setattr("imagerag.recipes.tiny_base.teacher._GRID_STEPS", (1, 2))
    monkeypatch.setattr("imagerag.recipes.tiny_base.teacher._NUM_SHOWN", 4)
    monkeypatch.setattr("imagerag.recipes.tiny_base.vae._BATCH_SIZE", 4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    kept = Kept()
    Training(RECIPE, drawings, [pictures], whole, kept).run()
    manifest = json.loads((whole / "manifest.json").read_text())
    assert set(manifest["code_points"]) == {drawing.concept.codepoint for drawing in drawings}
    assert manifest["recipe"]["student_steps"] == RECIPE.student_steps
    assert {name.split("/")[0] for name in kept.images} == {
        "vae",
        "hspace",
        "prior",
        "teacher",
        "student",
        "perceptual",
    }
    expected = _weights(whole)
    assert expected["unet"].keys() == expected["teacher"].keys()
    assert all(value.dtype == torch.float16 for value in expected["unet"].values())
    assert any(not torch.equal(expected["unet"][name], value) for name, value in expected["teacher"].items())

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_train_student", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            Training(RECIPE, drawings, [pictures], killed, Kept()).run()
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_train_vae", lambda *_: pytest.fail("done already"))
        patched.setattr(Training, "_train_teacher", lambda *_: pytest.fail("done already"))
        Training(RECIPE, drawings, [pictures], killed, Kept()).run()
    for part, weights in _weights(killed).items():
        assert all(torch.equal(value, expected[part][name]) for name, value in weights.items()), part
    with pytest.raises(UserError, match=r"weights of another recipe.*choose --out"):
        Training(replace(RECIPE, seed=1), drawings, [pictures], killed, Kept()).run()

    started, other = tmp_path / "started", tmp_path / "other"
    for folder in (started, other):
        folder.mkdir()
    Training(replace(RECIPE, vae_steps=0, prior_steps=0), drawings, [pictures], started, Kept(), start=whole).run()
    for part, weights in _weights(started).items():
        same = all(torch.equal(value, expected[part][name]) for name, value in weights.items())
        assert same == (part in ("vae", "perceptual")), part
    digests = json.loads((started / "manifest.json").read_text())["recipe"]["start"]
    assert digests["unet"] == sha256_of(whole / "unet" / "diffusion_pytorch_model.safetensors")
    assert digests["checkpoint"] == sha256_of(whole / "student.checkpoint")
    with pytest.raises(UserError, match="weights of another recipe"):
        Training(RECIPE, drawings, [pictures], started, Kept()).run()
    kept = Kept()
    Training(replace(RECIPE, vae_steps=0, teacher_steps=0), drawings, [pictures], other, kept, start=whole).run()
    assert {name.split("/")[0] for name in kept.images} == {"prior", "student"}
    weights = _weights(other)
    assert all(torch.equal(value, expected["teacher"][name]) for name, value in weights["teacher"].items())
    assert "checkpoint" not in json.loads((other / "manifest.json").read_text())["recipe"]["start"]

    longer = tmp_path / "longer"
    longer.mkdir()
    kept = Kept()
    only_teacher = replace(RECIPE, vae_steps=0, prior_steps=0, student_steps=0)
    Training(only_teacher, drawings, [pictures], longer, kept, start=whole).run()
    assert {name.split("/")[0] for name in kept.images} == {"teacher"}
    weights = _weights(longer)
    assert all(torch.equal(value, expected["unet"][name]) for name, value in weights["unet"].items())

    def distance(part: str) -> float:
        pairs = ((value.float(), expected[part][name].float()) for name, value in weights["teacher"].items())
        return float(sum((one - other).square().sum() for one, other in pairs))

    assert 0 < distance("teacher") < distance("unet"), "it went on with its own weights"


def test_a_larger_autoencoder_starts_from_a_smaller_ones_weights_and_latents() -> None:
    torch.manual_seed(0)
    config = dict(build_vae().config) | {"sample_size": 64, "block_out_channels": (16, 32, 64)}
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    former = AutoencoderKL.from_config(config | levels)
    pictures = torch.rand(2, 3, 128, 128) * 2 - 1
    kept = encode_halved(former, pictures).mean
    assert kept.shape == (2, 4, 16, 16)
    larger = enlarged(former).eval()
    assert larger.encode(pictures).latent_dist.mean.shape == kept.shape
    same = enlarged(larger)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in larger.state_dict().items())
    assert torch.equal(encode_halved(larger, pictures).mean, larger.encode(pictures).latent_dist.mean)
    # The decoder shares all levels that the former one has: from its latents, they compute the same.
    features = former.post_quant_conv(kept), larger.post_quant_conv(kept)
    middles = [
        vae.decoder.mid_block(vae.decoder.conv_in(own)) for vae, own in zip((former, larger), features, strict=True)
    ]
    for level in range(2):
        middles = [vae.decoder.up_blocks[level](own) for vae, own in zip((former, larger), middles, strict=True)]
    assert torch.equal(*middles)


def test_an_autoencoder_that_starts_from_another_keeps_its_latents(drawings: list[Drawing]) -> None:
    pictures, device = Pictures.of(drawings), torch.device("cpu")
    former = AutoencoderKL.from_pretrained(tiny_base.FOLDER / "vae", torch_dtype=torch.float32)
    before = encode_all(former, pictures.pixels, device)
    cutouts = Cutouts.of_drawings(pictures.pixels)
    phase = VaePhase(pictures, cutouts, cutouts, pictures, steps=3, seed=0, device=device, former=former)
    losses = [phase.step(index) for index in range(3)]
    assert losses[0]["regularization"] < 1e-6, "it starts as a copy"
    changes = [(encode_all(vae, pictures.pixels, device) - before).square().mean() for vae in (phase.vae, former)]
    assert 0 < changes[0] < 0.1
    assert changes[1] == 0, "the former one is not trained"


def test_a_deeper_mid_block_starts_with_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        patched.setattr("imagerag.recipes.tiny_base.teacher._MID_LAYERS", 2)
        shallow = build_unet().eval()
    deep = deepened(shallow).eval()
    assert sum(p.numel() for p in deep.parameters()) > 1.2 * sum(p.numel() for p in shallow.parameters())
    inputs = torch.randn(2, 4, 16, 16), 999, torch.randn(2, 5, 384)
    with torch.inference_mode():
        assert torch.equal(deep(*inputs).sample, shallow(*inputs).sample)
    assert deepened(deep).state_dict().keys() == deep.state_dict().keys()


def test_the_noise_chooses_among_a_concepts_drawings_evenly() -> None:
    latents = Latents(torch.zeros(6, 4, 16, 16), torch.zeros(6, dtype=torch.long), torch.arange(6).view(1, 6))
    noise = torch.randn(6000, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    counts = latents.chosen_by(noise, torch.zeros(6000, dtype=torch.long)).bincount(minlength=6)
    assert counts.min() > 900
    assert counts.max() < 1100
    lacking = Latents(latents.values, latents.concepts, torch.tensor([[0, -1, 2, -1, -1, 5]]))
    chosen = lacking.chosen_by(noise, torch.zeros(6000, dtype=torch.long))
    assert set(chosen.tolist()) == {0, 2, 5}
