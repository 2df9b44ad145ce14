"""A base model of random weights that shares its text tower with an index of a few drawings."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel

from imagerag.base.files import BaseIdentity
from imagerag.embedded import tiny_base
from imagerag.embedded.tiny_encoder import text_folder
from imagerag.embedding.encoder_files import resolve
from imagerag.generation.pipeline import ImageRAGTurboOutput, ImageRAGTurboPipeline
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.hspace.encode import encode_references, feature_identity, open_images, to_cache
from imagerag.retrieval import feature_column
from imagerag.retrieval.schema import Features, Fit
from imagerag.retrieval.store import Store
from tests.generation.folders import small_unet, small_vae
from tests.retrieval.rows import append, fixed_size_lists, make_rows

CAPTIONS = ["red dragon", "green dragon", "castle", "harp", "doughnut", "llama", "bicycle", "rain cloud"]
BASE = BaseIdentity(id="test", digest="c" * 64)


def make_pipeline(adapter: HSpaceAdapter | None = None, **changes: Any) -> ImageRAGTurboPipeline:
    """A base model of random weights that reads prompts with the text tower that made the index."""
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(tiny_base.FOLDER / "text_encoder")
    parts = {
        "vae": small_vae().eval(),
        "unet": UNet2DConditionModel(**small_unet() | {"cross_attention_dim": 384}).eval(),
        "scheduler": DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True,
                                   timestep_spacing="trailing", clip_sample=False),
        "tokenizer": AutoTokenizer.from_pretrained(tiny_base.FOLDER / "tokenizer"),
        "text_encoder": BertModel.from_pretrained(text_folder(), config=config).eval(),
        "adapter": adapter,
        "base_id": BASE.id,
        "base_digest": BASE.digest,
    }  # fmt: skip
    pipeline = ImageRAGTurboPipeline(**parts | changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_adapter() -> HSpaceAdapter:
    torch.manual_seed(1)
    adapter = HSpaceAdapter(channels=64, inner_dim=64, num_heads=2).eval()
    torch.nn.init.normal_(adapter.to_out.weight, std=0.5)
    return adapter


def drawing(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_store(folder: Path, plain: ImageRAGTurboPipeline, num_rows: int = len(CAPTIONS)) -> Store:
    store = Store(str(folder), "images")
    encoder = resolve("tiny").identity
    store.open_or_create(encoder)
    captions = CAPTIONS[:num_rows]
    embeds = fixed_size_lists(sentences(plain, captions))
    images = [drawing(number) for number in range(num_rows)]
    append(
        store, make_rows(0, num_rows, encoder, caption=captions, image=images, text_embed=embeds, image_embed=embeds)
    )
    return store


def sentences(plain: ImageRAGTurboPipeline, texts: list[str]) -> np.ndarray:
    own = plain._sentences(texts)
    assert own is not None
    return own


def fill(store: Store, plain: ImageRAGTurboPipeline, fit: Fit = "auto") -> None:
    identity = feature_identity(BASE, plain.unet.config, fit)

    def compute(images: list[bytes], captions: list[str]) -> Features:
        return to_cache(encode(plain, images, captions, fit))

    version = feature_column.prepare(store, identity)
    for fragment in feature_column.missing(store.dataset(version), identity):
        feature_column.commit(store, [feature_column.fill(store, identity, version, fragment, compute, 4)], version)


def encode(plain: ImageRAGTurboPipeline, images: list[bytes], captions: list[str], fit: Fit = "auto") -> torch.Tensor:
    return encode_references(plain.vae, plain.unet, plain._conditioner, open_images(images), captions, fit)


def latents(
    pipeline: ImageRAGTurboPipeline, prompt: Any = "a red dragon", seed: int = 0, **arguments: Any
) -> torch.Tensor:
    made: torch.Tensor = call(pipeline, prompt, seed, **arguments).images
    return made


def call(pipeline: ImageRAGTurboPipeline, prompt: Any, seed: int = 0, **arguments: Any) -> ImageRAGTurboOutput:
    count = (len(prompt) if isinstance(prompt, list) else 1) * arguments.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + number) for number in range(count)]
    return pipeline(prompt, generator=generators, output_type="latent", **arguments)
