import json
from pathlib import Path

import pytest
import torch

from imagerag.base.model import load_base
from imagerag.embedded import tiny_base
from imagerag.embedded.sample import load_drawings
from imagerag.errors import UserError
from imagerag.recipes.tiny_base.data import Pictures
from imagerag.recipes.tiny_base.vae import encode_all
from imagerag.training.config import FinetuneConfig, LossWeights
from imagerag.training.perceptual import LatentNetwork, augment, check_perceptual, choose_perceptual, load_perceptual
from tests.generation.folders import write_sd

CPU = torch.device("cpu")


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_pair_is_augmented_alike_and_each_row_in_its_own_way() -> None:
    latents = torch.randn(6, 4, 16, 16, generator=random())
    one, other = augment(torch.cat([latents, latents]), random(1)).chunk(2)
    assert torch.equal(one, other)
    same = torch.randn(1, 4, 16, 16, generator=random()).expand(64, -1, -1, -1)
    changed = augment(torch.cat([same, same]), random(1))[:64]
    assert len({each.sum().item() for each in changed}) > 60
    assert torch.equal(changed, augment(torch.cat([same, same]), random(1))[:64]), "by the generator alone"


def test_gradients_go_through() -> None:
    fake, real = torch.randn(2, 4, 4, 16, 16, generator=random())
    fake.requires_grad_()
    load_perceptual("tiny", CPU)(fake, real, random()).backward()
    assert fake.grad is not None
    assert fake.grad.abs().sum() > 0


def test_the_same_is_at_no_distance() -> None:
    latents = torch.randn(4, 4, 16, 16, generator=random())
    distance = load_perceptual("tiny", CPU)
    assert float(distance(latents, latents, random())) == pytest.approx(0, abs=1e-6)
    assert float(distance(latents, latents.flip(0), random())) > 0.1


def test_it_sees_what_a_drawing_shows_better_than_the_latents_do() -> None:
    """Of held-out concepts: how often the nearest other drawing shows the same. Measured: 0.56 against 0.48."""
    pictures = Pictures.of(load_drawings(splits=["held_out"]))
    latents = encode_all(load_base("tiny", "cpu").vae, pictures.pixels, CPU)
    network: LatentNetwork = LatentNetwork.from_pretrained(tiny_base.FOLDER / "perceptual", local_files_only=True)

    def found(rows: torch.Tensor) -> float:
        similarities = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T
        nearest = similarities.fill_diagonal_(-2).argmax(1)
        return float((pictures.concepts[nearest] == pictures.concepts).float().mean())

    with torch.inference_mode():
        features = [network.features(part) for part in latents.split(128)]
    rows = [torch.cat([torch.nn.functional.normalize(f, dim=1).flatten(1) for f in part], 1) for part in features]
    assert found(torch.cat(rows)) > found((latents - latents.mean(0)).flatten(1)) + 0.04


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("elatentlpips:sd21", "`pip install elatentlpips`"),
        ("elatentlpips:sd9", "supports the latents of sd15, sd21, sdxl; got 'sd9'"),
        ("/nowhere", "/nowhere has no config.json"),
    ],
)
def test_a_network_that_is_not_there_is_refused(spec: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        check_perceptual(spec)


@pytest.mark.parametrize(
    ("scaling", "text_dim", "network"),
    [(0.18215, 768, "sd15"), (0.18215, 1024, "sd21"), (0.13025, 2048, "sdxl")],
)
def test_the_network_is_that_of_the_students_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaling: float, text_dim: int, network: str
) -> None:
    base = write_sd(tmp_path / "base")
    for part, values in (("vae", {"scaling_factor": scaling}), ("unet", {"cross_attention_dim": text_dim})):
        config = base / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values))
    with pytest.raises(UserError, match="`pip install elatentlpips`"):
        choose_perceptual(FinetuneConfig(), str(base))
    monkeypatch.setattr("imagerag.training.perceptual.find_spec", lambda _: object())
    assert choose_perceptual(FinetuneConfig(), str(base)).perceptual_network == f"elatentlpips:{network}"
    assert choose_perceptual(FinetuneConfig(), "tiny").perceptual_network == "tiny"
    for config in (
        FinetuneConfig(perceptual_network="elatentlpips:sd15"),
        FinetuneConfig(losses=LossWeights(perceptual=0)),
    ):
        assert choose_perceptual(config, str(base)) == config


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    LatentNetwork(4, channels=(8, 16), embed_dim=8).save_pretrained(tmp_path)
    distance = load_perceptual(str(tmp_path), CPU)
    assert distance.name == str(tmp_path)
    assert float(distance(torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8), random())) >= 0
