"""A pipeline that is saved and loaded: with LoRA, and with an index that is pinned or lies beside it."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from peft import LoraConfig

from imagerag.base.model import load_base
from imagerag.errors import UserError
from imagerag.generation.pipeline import ImageRAGTurboPipeline, ImageRAGTurboXLPipeline
from imagerag.generation.saving import align
from imagerag.hspace.lora import LORA_NAME
from imagerag.retrieval.pins import pin
from imagerag.retrieval.publish import PublishConfig
from imagerag.retrieval.store import Store
from tests.generation.with_index import BASE, drawing, fill, make_adapter, make_pipeline, sentences, write_store
from tests.retrieval.rows import append, fixed_size_lists, index_and_publish, make_rows


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = write_store(tmp_path / "index", make_pipeline())
    fill(store, make_pipeline())
    index_and_publish(store)
    return store


def add_lora(pipeline: ImageRAGTurboPipeline, name: str = LORA_NAME) -> None:
    torch.manual_seed(2)
    layers = r"up_blocks\..*\.(to_q|conv1|conv_shortcut)"
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False), adapter_name=name)


def latents(pipeline: ImageRAGTurboPipeline, **arguments: Any) -> torch.Tensor:
    made: torch.Tensor = pipeline(
        "a red dragon", generator=torch.Generator().manual_seed(0), output_type="latent", **arguments
    ).images
    return made


def load(folder: Path) -> ImageRAGTurboPipeline:
    pipeline = ImageRAGTurboPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_lora_comes_back_bit_for_bit_and_the_base_model_is_as_it_was(store: Store, tmp_path: Path) -> None:
    plain = make_pipeline()
    pipeline = make_pipeline(make_adapter()).use_index(store.uri, store.name)
    add_lora(pipeline)
    expected = latents(pipeline)
    assert not torch.allclose(expected, latents(plain), atol=1e-2)

    assert torch.equal(latents(pipeline, adapter_scale=0.0), latents(plain)), "nor is there LoRA then"

    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(latents(pipeline), expected), "saving changes nothing"
    loaded = load(tmp_path / "saved")
    assert torch.equal(latents(loaded), expected)
    assert torch.equal(latents(loaded, fusion="none"), latents(plain))
    without = make_pipeline(unet=type(plain.unet).from_pretrained(tmp_path / "saved" / "unet"))
    assert torch.equal(latents(without), latents(plain)), "what is in the folder is the base model itself"

    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(latents(load(tmp_path / "again")), expected)
    shutil.rmtree(tmp_path / "saved" / "lora")
    with pytest.raises(UserError, match=r"LoRA belongs to the pipeline in .*pytorch_lora_weights.safetensors does not"):
        load(tmp_path / "saved")


def test_lora_of_another_origin_is_not_saved(tmp_path: Path) -> None:
    pipeline = make_pipeline(make_adapter())
    for name in ("style", LORA_NAME):  # alone, and beside the training's
        add_lora(pipeline, name)
        with pytest.raises(UserError, match="no other; 'style' is attached"):
            pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_fused_lora_is_neither_the_base_model_nor_saved_as_it(store: Store, tmp_path: Path) -> None:
    plain = make_pipeline()
    pipeline = make_pipeline(make_adapter()).use_index(store.uri, store.name)
    add_lora(pipeline)
    expected = latents(pipeline)
    pipeline.fuse_lora()
    assert torch.allclose(latents(pipeline), expected, atol=1e-4)
    for arguments in ({"fusion": "none"}, {"fusion": "slerp"}, {"adapter_scale": 0.0}):
        with pytest.raises(UserError, match=r"LoRA is fused into the UNet's weights, .*: call unfuse_lora\(\) first"):
            latents(pipeline, **arguments)
    with pytest.raises(UserError, match=r"call unfuse_lora\(\) first"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()

    pipeline.unfuse_lora()
    assert torch.allclose(latents(pipeline, fusion="none"), latents(plain), atol=1e-4)
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.allclose(latents(load(tmp_path / "saved")), expected, atol=1e-4)


def test_fused_lora_of_another_origin_stays_in_calls_without_the_adapter(store: Store) -> None:
    pipeline = make_pipeline(make_adapter()).use_index(store.uri, store.name)
    add_lora(pipeline, "style")
    styled = latents(pipeline, fusion="none")
    add_lora(pipeline)
    pipeline.fuse_lora(adapter_names=["style"])
    assert torch.allclose(latents(pipeline, fusion="none"), styled, atol=1e-4)


def test_a_pinned_version_stays_whatever_is_published(store: Store, tmp_path: Path) -> None:
    version = store.version
    pipeline = make_pipeline(make_adapter()).use_index(store.uri, store.name, version)
    expected = latents(pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    pin(store, version, "a-model")
    embeds = fixed_size_lists(sentences(make_pipeline(), ["a red dragon"]))
    rows = make_rows(
        20, 21, store.encoder, caption=["a red dragon"], image=[drawing(20)], text_embed=embeds, image_embed=embeds
    )
    append(store, rows)
    fill(store, make_pipeline())
    index_and_publish(store, PublishConfig(keep=1))
    assert torch.equal(latents(load(tmp_path / "saved")), expected)
    moved = make_pipeline(make_adapter()).use_index(store.uri, store.name)
    assert not torch.equal(latents(moved), expected), "the published version finds the new row"

    gone, now = version + 1, store.version
    with pytest.raises(UserError, match=rf"version {gone} of the index 'images' .*not to be had: version {now} is pub"):
        make_pipeline().use_index(store.uri, store.name, gone)
    shutil.rmtree(store.table_uri)
    with pytest.raises(UserError, match=rf"version {version} of the index .*there is no such table"):
        latents(load(tmp_path / "saved"))


def test_an_index_that_lies_beside_is_found_wherever_the_folder_is(store: Store, tmp_path: Path) -> None:
    pipeline = make_pipeline(make_adapter()).use_index(store.uri, store.name)
    expected = latents(pipeline)
    pipeline.register_to_config(index_uri="index")
    pipeline.save_pretrained(tmp_path / "saved")
    shutil.move(store.uri, tmp_path / "saved" / "index")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    assert torch.equal(latents(load(tmp_path / "moved")), expected)
    assert BASE.digest == load(tmp_path / "moved").config.base_digest


def test_an_index_in_the_current_folder_is_found_from_any_other(store: Store, tmp_path: Path) -> None:
    os.chdir(store.uri)
    pipeline = make_pipeline(make_adapter()).use_index(".", store.name)
    os.chdir(tmp_path)
    pipeline.save_pretrained("saved")
    assert torch.equal(latents(load(tmp_path / "saved")), latents(pipeline))
    assert pipeline.config.index_uri == store.uri


@pytest.fixture
def load_by_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Load a folder by the class that knows no pipeline of ours."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # which it adds to

    def load_it(folder: Path, **arguments: Any) -> Any:
        code = {"custom_pipeline": "pipeline", "trust_remote_code": True}
        pipeline = DiffusionPipeline.from_pretrained(folder, **code | arguments)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load_it


def test_diffusers_own_class_loads_all_of_it(
    store: Store, tmp_path: Path, load_by_diffusers: Callable[..., Any]
) -> None:
    pipeline = make_pipeline(make_adapter()).use_index(store.uri, store.name)
    add_lora(pipeline)
    expected = latents(pipeline)
    pipeline.register_to_config(index_uri="index")
    pipeline.save_pretrained(tmp_path / "saved")
    shutil.move(store.uri, tmp_path / "saved" / "index")
    with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
        load_by_diffusers(tmp_path / "saved", trust_remote_code=False)
    loaded = load_by_diffusers(tmp_path / "saved")
    assert type(loaded) is ImageRAGTurboPipeline
    assert torch.equal(latents(loaded), expected)


def test_diffusers_own_class_finds_the_kind_and_the_dtype(
    bases: dict[str, Path], tmp_path: Path, load_by_diffusers: Callable[..., Any]
) -> None:
    for name, kind in {"sd-turbo": ImageRAGTurboPipeline, "sdxl-turbo": ImageRAGTurboXLPipeline}.items():
        first = ImageRAGTurboPipeline.from_base(load_base(str(bases[name]), "cpu", "bf16"))
        first.save_pretrained(tmp_path / name)
        loaded = load_by_diffusers(tmp_path / name)
        assert type(loaded) is kind
        assert torch.equal(latents(loaded), latents(first))
        assert load_by_diffusers(tmp_path / name, dtype=torch.float32).unet.dtype == torch.float32
        mixed = ImageRAGTurboPipeline.from_pretrained(
            tmp_path / name, dtype={"vae": torch.float32, "unet": torch.bfloat16, "default": torch.float16}
        )
        parts = (mixed.vae, mixed.unet, mixed.text_encoder)
        assert [part.dtype for part in parts] == [torch.float32, torch.bfloat16, torch.float16]


def test_a_pipeline_of_anothers_parts_has_the_lora_that_they_have(tmp_path: Path) -> None:
    pipeline = make_pipeline(make_adapter())
    add_lora(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    made = ImageRAGTurboPipeline.from_pipe(StableDiffusionPipeline.from_pipe(loaded), adapter=loaded.adapter)
    assert made.config.has_lora
    loaded.unload_lora_weights()
    assert not ImageRAGTurboPipeline.from_pipe(loaded).config.has_lora
    assert not hasattr(loaded.unet, "peft_config")


def test_weights_are_aligned_as_torch_allocates_them() -> None:
    module = torch.nn.Linear(8, 8)
    raw = torch.zeros(8 * 8 * 4 + 64 + 4, dtype=torch.uint8)
    offset = -raw.data_ptr() % 64 + 4  # as in a memory-mapped file whose header has any length
    module.weight.data = raw[offset : offset + 256].view(torch.float32).view(8, 8).fill_(0.5)
    assert module.weight.data_ptr() % 64 == 4
    align(SimpleNamespace(components={"unet": module, "scheduler": object()}))
    assert [tensor.data_ptr() % 64 for tensor in module.parameters()] == [0, 0]
    assert module.weight.eq(0.5).all()
