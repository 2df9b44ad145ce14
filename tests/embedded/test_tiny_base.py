"""What the shipped weights are and can do. The bars lie between what was measured and what an empty model reaches."""

import json

import pytest
import torch

from imagerag.base.model import BaseModel, load_base
from imagerag.embedded import tiny_base
from imagerag.embedded.sample import load_concepts, load_drawings
from imagerag.evaluation.intervals import estimate
from imagerag.generation.batch import generate
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.split import encode
from imagerag.recipes.tiny_base import hspace
from imagerag.recipes.tiny_base.data import Pictures
from imagerag.recipes.tiny_base.latents import Latents
from imagerag.recipes.tiny_base.report import identified
from imagerag.recipes.tiny_base.vae import encode_all, to_input

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student() -> BaseModel:
    return load_base("tiny", "cpu")


@pytest.fixture(scope="module")
def pipeline(student: BaseModel) -> ImageRAGTurboPipeline:
    made = ImageRAGTurboPipeline.from_base(student)
    made.set_progress_bar_config(disable=True)
    return made


def test_it_was_trained_on_the_base_split_only() -> None:
    trained = set(json.loads((tiny_base.FOLDER / tiny_base.MANIFEST_NAME).read_text())["code_points"])
    assert trained == {concept.codepoint for concept in load_concepts() if concept.split == "base"}


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in tiny_base.FOLDER.rglob("*") if path.is_file()) < 40e6


def test_no_configuration_names_the_machine_that_made_it() -> None:
    for path in tiny_base.FOLDER.rglob("*config.json"):
        assert "_name_or_path" not in json.loads(path.read_text()), path


def test_teacher_and_student_share_all_but_the_unet(student: BaseModel) -> None:
    teacher = load_base("tiny-teacher", "cpu")
    assert teacher.identity.digest != student.identity.digest
    configs = [dict(base.unet.config) | {"_name_or_path": ""} for base in (teacher, student)]
    assert configs[0] == configs[1]
    weights = teacher.vae.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in student.vae.state_dict().items())
    picture = ImageRAGTurboPipeline.from_base(teacher)("fox", num_inference_steps=2, guidance_scale=3.0).images[0]
    assert picture.size == (128, 128)


def test_the_autoencoder_keeps_held_out_drawings(student: BaseModel) -> None:
    pixels = to_input(Pictures.of(load_drawings(splits=["held_out"])[::4]).pixels, CPU)
    with torch.inference_mode():
        latents = student.vae.encode(pixels).latent_dist.mode()
        rebuilt = student.vae.decode(latents).sample.clamp(-1, 1)
    decibels = 10 * torch.log10(4 / (pixels - rebuilt).square().mean((1, 2, 3)))
    assert estimate(decibels.numpy()).low > 29
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.3


def test_the_mid_block_carries_the_picture(student: BaseModel) -> None:
    drawings = load_drawings(splits=["held_out"])[::4]
    latents = encode_all(student.vae, Pictures.of(drawings).pixels, CPU)
    text = student.conditioner.encode([drawing.concept.name for drawing in drawings]).embeds
    measures = hspace.measure(student.unet, latents, text)
    assert measures.rebuilding.high < 0.15, "an average picture has an error of one"
    assert measures.zeroing > 0.7
    assert measures.shuffling > 0.8


def test_h_from_text_is_like_that_of_drawings(student: BaseModel) -> None:
    """Fusion interpolates between the two. Measured: 0.27 of the variance; the mean of all drawings has 0.74."""
    concepts = [each for each in load_concepts() if each.split == "base"][::8]
    pictures = Pictures.of([drawing for drawing in load_drawings(splits=["base"]) if drawing.concept in concepts])
    latents = Latents.of(encode_all(student.vae, pictures.pixels, CPU), pictures)
    names = {each.codepoint: each.name for each in concepts}
    text = student.conditioner.encode([names[each] for each in pictures.codepoints]).embeds
    noise = torch.randn(len(text), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn = latents.values[latents.chosen_by(noise, torch.arange(len(text)))]
    with torch.inference_mode():
        of_drawings, made = (encode(student.unet, each, t, text).h for each, t in ((drawn, 0), (noise, 999)))
    scale = of_drawings.std((0, 2, 3), keepdim=True)
    mean = of_drawings.mean(0, keepdim=True)
    errors, of_mean = (((each - of_drawings) / scale).square().mean((1, 2, 3)) for each in (made, mean))
    assert errors.mean() < 0.45
    assert estimate((errors - of_mean).numpy()).high < -0.2


def test_other_noise_is_another_picture_of_the_same_thing(pipeline: ImageRAGTurboPipeline) -> None:
    pictures = [picture.image for picture in generate(pipeline, ["fox"], range(4), num_inference_steps=1)]
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_it_makes_what_it_was_trained_on(pipeline: ImageRAGTurboPipeline) -> None:
    """Nearest of 96 concepts' drawings, by the latent; chance is 0.01."""
    drawings = load_drawings(splits=["base"])
    concepts = list({drawing.concept.codepoint: drawing.concept for drawing in drawings}.values())[::10][:96]
    chosen = [drawing for drawing in drawings if drawing.concept in concepts]
    names = [concept.name for concept in concepts]
    made = [next(generate(pipeline, [name], [seed], num_inference_steps=1)) for seed, name in enumerate(names)]
    assert identified(pipeline.vae, made, concepts, chosen).low > 0.6
