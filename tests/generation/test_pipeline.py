import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imagerag.base.model import load_base
from imagerag.errors import UserError
from imagerag.generation.finetuned import ADAPTER, MANIFEST, load_finetuned
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from tests.devices import DEVICES
from tests.generation.with_index import make_adapter


@pytest.fixture(scope="module")
def pipeline(bases: dict[str, Path]) -> ImageRAGTurboPipeline:
    made = ImageRAGTurboPipeline.from_base(load_base(str(bases["sd-turbo"]), device="cpu"))
    made.set_progress_bar_config(disable=True)
    return made


def _of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_same_seed_is_the_same_picture(pipeline: ImageRAGTurboPipeline) -> None:
    one, same, other = (pipeline("a fox", generator=_of(seed), output_type="pt").images for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.01)


def test_a_batch_is_its_pictures(pipeline: ImageRAGTurboPipeline) -> None:
    prompts = ["a fox", "a lion"]
    batch = pipeline(
        prompts, num_images_per_prompt=2, generator=[_of(seed) for seed in range(4)], output_type="pt"
    ).images
    for number, picture in enumerate(batch):
        alone = pipeline(prompts[number // 2], generator=_of(number), output_type="pt").images[0]
        assert torch.allclose(alone, picture, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_draws_nearly_the_same(
    bases: dict[str, Path], pipeline: ImageRAGTurboPipeline, device: str
) -> None:
    half = ImageRAGTurboPipeline.from_base(load_base(str(bases["sd-turbo"]), device, "bf16"))
    full, near, other = (
        each("a fox", generator=_of(seed), output_type="pt").images.float().cpu()
        for each, seed in ((pipeline, 1), (half, 1), (half, 2))
    )
    assert 0 < (near - full).abs().mean() < 0.1 * (other - full).abs().mean()


@pytest.mark.gpu
def test_compiled_blocks_draw_the_same(bases: dict[str, Path]) -> None:
    """On a GPU alone: on a CPU it takes a compiler and a quarter of a minute."""
    pipeline = ImageRAGTurboPipeline.from_base(load_base(str(bases["sd-turbo"]), "cuda", "fp32"))
    plain = pipeline("a fox", generator=_of(1), output_type="pt").images
    pipeline.unet.compile_repeated_blocks()
    compiled = pipeline("a fox", generator=_of(1), output_type="pt").images
    assert torch.allclose(compiled, plain, atol=1e-3)


def test_it_tells_of_every_step_and_makes_what_is_asked_for(pipeline: ImageRAGTurboPipeline) -> None:
    steps: list[int] = []

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert pipe is pipeline
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    latents = pipeline("a fox", num_inference_steps=3, output_type="latent", callback_on_step_end=on_step_end).images
    assert steps == [0, 1, 2]
    assert torch.equal(latents, torch.zeros(1, 4, 8, 8)), "what it returns is used"
    assert pipeline("a fox").images[0].size == (16, 16)
    assert pipeline("a fox", output_type="np").images.shape == (1, 16, 16, 3)
    noise = torch.randn(1, 4, 8, 8, generator=_of(0))
    given = pipeline("a fox", latents=noise, output_type="pt").images
    assert torch.equal(given, pipeline("a fox", generator=_of(0), output_type="pt").images)


@pytest.mark.parametrize("name", ["sd-turbo", "sdxl-turbo"])
def test_it_is_saved_and_loaded(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    first = ImageRAGTurboPipeline.from_base(load_base(str(bases[name]), device="cpu"))
    first.save_pretrained(tmp_path / "saved")
    again = ImageRAGTurboPipeline.from_pretrained(tmp_path / "saved")
    pictures = [each("a fox", generator=_of(0), output_type="pt").images for each in (first, again)]
    assert torch.allclose(*pictures, atol=1e-5)
    assert load_base(str(tmp_path / "saved"), device="cpu").unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": "a", "num_inference_steps": 0}, "between 1 and 1000; got 0"),
        ({"prompt": "a", "num_inference_steps": 1001}, "between 1 and 1000; got 1001"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "at least 1 picture of a prompt can be made; got 0"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type is one of pil, np, pt, latent; got 'jpg'"),
        ({}, "a prompt, or prompt_embeds, says what to make a picture of; got neither"),
        ({"prompt": ["a", 3]}, "a prompt is a text; got 3"),
        ({"prompt": "a", "generator": [torch.Generator()] * 2}, "one for each of the 1 pictures; got 2"),
    ],
)
def test_arguments_are_checked(pipeline: ImageRAGTurboPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(**arguments)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_it_comes_back_in_the_dtype_that_it_was_saved_in(bases: dict[str, Path], tmp_path: Path, dtype: Any) -> None:
    first = ImageRAGTurboPipeline.from_base(load_base(str(bases["sd-turbo"]), "cpu", dtype))
    first.save_pretrained(tmp_path)
    again = ImageRAGTurboPipeline.from_pretrained(tmp_path)
    assert torch.equal(*(each("a fox", generator=_of(0), output_type="latent").images for each in (first, again)))
    for name in ("dtype", "torch_dtype"):  # diffusers' new and old name
        other = ImageRAGTurboPipeline.from_pretrained(tmp_path, **{name: torch.float32})
        assert other("a fox", generator=_of(0), output_type="latent").images.dtype == torch.float32


def test_a_model_whose_guidance_is_an_input_has_a_default_for_it(bases: dict[str, Path]) -> None:
    lcm = ImageRAGTurboPipeline.from_pretrained(bases["lcm"])
    made, same, other = (
        lcm("a fox", generator=_of(0), output_type="latent", **arguments).images
        for arguments in ({}, {"guidance_scale": 8.5}, {"guidance_scale": 0.0})
    )
    assert torch.equal(made, same)
    assert not torch.allclose(made, other, atol=1e-4)


def test_an_adapter_of_another_base_model_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(str(bases["sd-turbo"]), device="cpu")
    make_adapter().save_pretrained(tmp_path / ADAPTER)
    (tmp_path / MANIFEST).write_text(json.dumps({"finetuned": {"base": "tiny", "base_digest": "0" * 64}}))
    with pytest.raises(UserError, match=rf"was trained for tiny \(digest {'0' * 64}\), not for {base.identity.id} "):
        load_finetuned(tmp_path, base)


def test_the_vae_of_sdxl_is_run_in_its_range(bases: dict[str, Path]) -> None:
    pipeline = ImageRAGTurboPipeline.from_pretrained(bases["sdxl-turbo"], dtype=torch.float16)
    assert pipeline.vae.config.force_upcast
    seen = []
    for module in (pipeline.vae.encoder, pipeline.vae.decoder):
        module.register_forward_pre_hook(lambda module, _: seen.append(next(module.parameters()).dtype))
    picture = Image.radial_gradient("L")
    made = pipeline("a fox", reference_images=picture, output_type="pt", generator=_of(0)).images
    assert made.isfinite().all()
    assert seen == [torch.float32] * 2
    assert pipeline.vae.dtype == torch.float16
