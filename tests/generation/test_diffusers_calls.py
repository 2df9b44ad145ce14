"""What diffusers' documentation calls StableDiffusionPipeline with: ours does the same, and takes references too."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch._dynamo.testing import CompileCounter
from transformers import CLIPConfig, CLIPImageProcessor

from imagerag.generation.pipeline import ImageRAGTurboPipeline

SCHEDULERS = [
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
]  # fmt: skip
REFERENCE: dict[str, Any] = {
    "reference_images": Image.radial_gradient("L").convert("RGB"), "reference_captions": "a circle",
    "fusion": "slerp", "w": 0.2,
}  # fmt: skip
TOKEN = "<toy>"

Draw = Callable[..., Any]
"""A pipeline, its folder and what else it is called with, to pictures."""


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def draw(pipe: Any, prompt: Any = "a fox", **arguments: Any) -> Any:
    defaults = {"generator": seeds(1)[0], "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    return pipe(prompt, **defaults | arguments).images


def with_embeds(pipe: Any, **extra: Any) -> Any:
    embeds, negative = pipe.encode_prompt("a fox", "cpu", 1, True, negative_prompt="blue")
    return draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative, **extra)


def with_callback(pipe: Any, **extra: Any) -> Any:
    def on_step_end(own: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert own.num_timesteps == 2
        return {"latents": 0.9 * tensors["latents"], "prompt_embeds": 1.1 * tensors["prompt_embeds"]}

    tensors = ["latents", "prompt_embeds"]
    return draw(pipe, callback_on_step_end=on_step_end, callback_on_step_end_tensor_inputs=tensors, **extra)


def interrupted(pipe: Any, **extra: Any) -> Any:
    def on_step_end(own: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own._interrupt = step == 0
        return tensors

    return draw(pipe, num_inference_steps=4, callback_on_step_end=on_step_end, **extra)


def with_scheduler(name: str) -> Draw:
    def with_it(pipe: Any, **extra: Any) -> Any:
        kind = getattr(diffusers, name)
        pipe.scheduler = kind.from_config({"beta_schedule": "scaled_linear"} | dict(pipe.scheduler.config))
        return draw(pipe, num_inference_steps=4, **extra)

    return with_it


def after(change: Callable[[Any], Any]) -> Draw:
    def changed(pipe: Any, **extra: Any) -> Any:
        change(pipe)
        return draw(pipe, ["a fox", "a lion"], generator=seeds(2), **extra)

    return changed


def add_lora(pipe: Any, **weights: Any) -> None:
    torch.manual_seed(0)
    other = copy.deepcopy(pipe.unet)
    other.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(other))
    pipe.load_lora_weights(StableDiffusionPipeline.pack_weights(layers, "unet"), adapter_name="toy", **weights)
    assert pipe.get_active_adapters() == ["toy"]


def set_half(pipe: Any) -> None:
    add_lora(pipe)
    pipe.set_adapters("toy", 0.5)


def fuse_lora(pipe: Any) -> None:
    add_lora(pipe)
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()


def add_token(pipe: Any) -> None:
    torch.manual_seed(0)
    pipe.load_textual_inversion({TOKEN: torch.randn(2, 32)})


def taesd(pipe: Any) -> None:
    torch.manual_seed(0)
    sides = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    pipe.vae = AutoencoderTiny(**sides, **blocks, latent_channels=4).eval()


CALLS: dict[str, Draw] = {
    "a prompt": draw,
    "prompts": lambda pipe, **extra: draw(pipe, ["a fox", "a lion"], generator=seeds(2), **extra),
    "no text": lambda pipe, **extra: draw(pipe, "", **extra),
    "by position": lambda pipe, **extra: pipe(
        "a fox", 24, 16, 2, generator=seeds(1)[0], guidance_scale=0.0, output_type="pt", **extra
    ).images,
    "no guidance": lambda pipe, **extra: draw(pipe, guidance_scale=0.0, **extra),
    "negative prompt": lambda pipe, **extra: draw(pipe, negative_prompt="blue, small", **extra),
    "embeds": with_embeds,
    "pictures of a prompt": lambda pipe, **extra: draw(pipe, num_images_per_prompt=3, generator=seeds(3), **extra),
    "height and width": lambda pipe, **extra: draw(pipe, height=32, width=24, **extra),
    "latents": lambda pipe, **extra: draw(pipe, latents=torch.ones(1, 4, 8, 8), **extra),
    "timesteps": lambda pipe, **extra: draw(pipe, timesteps=[900, 300], **extra),
    "sigmas": lambda pipe, **extra: draw(pipe, sigmas=[10.0, 1.0], **extra),
    "eta": lambda pipe, **extra: (
        setattr(pipe, "scheduler", diffusers.DDIMScheduler.from_config(pipe.scheduler.config)),
        draw(pipe, eta=0.7, **extra),
    )[1],
    "guidance rescale": lambda pipe, **extra: draw(pipe, guidance_rescale=0.7, **extra),
    "a long prompt": lambda pipe, **extra: draw(pipe, 50 * "a fox and ", **extra),
    "output pil": lambda pipe, **extra: diffusers.image_processor.VaeImageProcessor.pil_to_numpy(
        draw(pipe, output_type="pil", **extra)
    ),
    "output np": lambda pipe, **extra: draw(pipe, output_type="np", **extra),
    "output latent": lambda pipe, **extra: draw(pipe, output_type="latent", **extra),
    "a tuple": lambda pipe, **extra: pipe(
        "a fox", num_inference_steps=2, generator=seeds(1)[0], guidance_scale=0.0, output_type="pt", return_dict=False,
        **extra,
    )[0],
    "callback": with_callback,
    "guidance cut off": lambda pipe, **extra: draw(
        pipe, num_inference_steps=4, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5), **extra
    ),
    "interrupted": interrupted,
    "vae slicing": after(lambda pipe: pipe.vae.enable_slicing()),
    "vae tiling": after(lambda pipe: pipe.vae.enable_tiling()),
    "attention slicing": after(lambda pipe: pipe.enable_attention_slicing()),
    "freeu": after(lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)),
    "fused projections": after(lambda pipe: pipe.fuse_qkv_projections()),
    "channels last": after(lambda pipe: pipe.unet.to(memory_format=torch.channels_last)),
    "taesd": after(taesd),
    "lora": after(add_lora),
    "lora by half": after(set_half),
    "lora fused": after(fuse_lora),
    "lora off": after(lambda pipe: (add_lora(pipe), pipe.disable_lora())),
    "lora scale of a call": lambda pipe, **extra: (
        add_lora(pipe), draw(pipe, cross_attention_kwargs={"scale": 0.3}, **extra),
    )[1],
    "textual inversion": lambda pipe, **extra: (add_token(pipe), draw(pipe, f"a {TOKEN} fox", **extra))[1],
    "model offload": after(lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    "group offload": after(
        lambda pipe: pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    ),
    "bfloat16": lambda pipe, **extra: draw(pipe.to(torch.bfloat16), **extra).float(),
    **{name: with_scheduler(name) for name in SCHEDULERS},
}  # fmt: skip


@pytest.fixture(scope="module")
def both(bases: dict[str, Path]) -> tuple[Any, Any]:
    return tuple(each.from_pretrained(bases["sd-turbo"]) for each in (StableDiffusionPipeline, ImageRAGTurboPipeline))


def fresh(pipe: Any) -> Any:
    """A pipeline that can be changed."""
    made = type(pipe)(**copy.deepcopy(pipe.components), requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_diffusers_own_bit_for_bit_and_takes_references_too(both: tuple[Any, Any], name: str) -> None:
    theirs, ours = (torch.as_tensor(CALLS[name](fresh(pipe))) for pipe in both)
    assert theirs.isfinite().all()
    assert torch.equal(ours, theirs)
    shown = torch.as_tensor(CALLS[name](fresh(both[1]), **REFERENCE))
    assert shown.shape == theirs.shape
    assert shown.isfinite().all()
    assert not torch.allclose(shown, theirs, atol=1e-4)


def test_pipelines_are_made_of_each_other(both: tuple[Any, Any]) -> None:
    theirs = both[0]
    expected = draw(fresh(theirs))
    made = ImageRAGTurboPipeline.from_pipe(fresh(theirs), slerp_w=0.3)
    assert torch.equal(draw(made), expected)
    assert not torch.allclose(draw(made, **REFERENCE), expected, atol=1e-4)
    assert torch.equal(draw(StableDiffusionPipeline.from_pipe(made)), expected)
    again = ImageRAGTurboPipeline.from_pipe(StableDiffusionImg2ImgPipeline.from_pipe(made))
    assert torch.equal(draw(again), expected)
    assert again.config.slerp_w == 0.3


def test_a_compiled_unet_is_what_the_pipeline_runs(both: tuple[Any, Any]) -> None:
    torch.compiler.reset()
    counter, pipe = CompileCounter(), fresh(both[1])
    expected = [draw(pipe), draw(pipe, **REFERENCE)]
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    assert torch.equal(draw(pipe), expected[0])
    assert torch.equal(draw(pipe, **REFERENCE), expected[1])
    assert counter.frame_count == 1


def test_a_safety_checker_says_what_it_found(both: tuple[Any, Any]) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**size, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=size, vision_config=vision, projection_dim=8)).eval()
    checker.concept_embeds_weights.fill_(-2)  # so that it finds everything in every picture
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    for pipe in map(fresh, both):
        pipe.register_modules(safety_checker=checker, feature_extractor=processor)
        made = pipe(["a fox", "a lion"], generator=seeds(2), num_inference_steps=2)
        assert made.nsfw_content_detected == [True, True]
        assert not any(picture.getbbox() for picture in made.images), "they are black"


def test_what_no_pipeline_knows_is_an_error(both: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'reference_image'"):
        both[1]("a fox", reference_image=REFERENCE["reference_images"])


def test_latents_are_ordinary_tensors(both: tuple[Any, Any]) -> None:
    latents = draw(both[1], output_type="latent")
    latents.mul_(2).requires_grad_()
    assert not latents.is_inference()
