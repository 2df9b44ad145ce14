"""Shards to committed rows at ViT-B/32 size, beside a bare open_clip loop over tensors that are in memory already."""

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from PIL import Image

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.embedded.sample import load_drawings
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.embed import embed
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from tests.bench.corpus import HOST, make_shards, serving, write_url_list
from tests.bench.harness import Row, Scale, alternate, in_fresh_process, median

BAR = 0.9
MODEL = "ViT-B-32"
IMAGE_SIZE = 256
BATCH_SIZE = 32


@dataclass(frozen=True)
class Size:
    """How many images to embed how often; `num_few` of them take little more than the start-up."""

    num_images: int
    num_few: int
    repetitions: int


SIZES: dict[Scale, Size] = {"small": Size(128, 32, 1), "full": Size(4_096, 64, 1)}


def run(scale: Scale, folder: Path) -> list[Row]:
    """Embed the same images and captions with either, in turn."""
    size = SIZES[scale]
    model = folder / "model"
    in_fresh_process(_save_model, model)
    files = _write_jpegs(folder / "images", size.num_images)
    config = DownloadConfig(allowed_hosts=(HOST,), image_size=IMAGE_SIZE, shard_size=256)
    with serving(folder / "images") as base_url:
        write_url_list(few := folder / "few.parquet", base_url, files, range(size.num_few))
        write_url_list(all_ := folder / "all.parquet", base_url, files, range(size.num_images))
        (few_uri, all_uri), _ = in_fresh_process(make_shards, [few, all_], folder / "home", config)

    few_s, ours_s, peer_s = alternate(
        size.repetitions,
        partial(_time, _embed_ours, few_uri, model, folder / "home"),
        partial(_time, _embed_ours, all_uri, model, folder / "home"),
        partial(_time, _embed_barely, folder / "images", files, model),
    )
    row = partial(
        Row,
        unit="pairs/s",
        peer=size.num_images / median(peer_s),
        peer_name=f"open_clip {version('open_clip_torch')} loop, model loaded, images decoded, texts tokenized",
        at_least=BAR,
    )
    num_more = size.num_images - size.num_few
    return [
        row(
            what=f"{MODEL}, {size.num_images:,} pairs, without start-up "
            f"(what they take longer than {size.num_few} pairs)",
            ours=num_more / (median(ours_s) - median(few_s)),
        ),
        row(
            what=f"{MODEL}, {size.num_images:,} pairs, with the start of Ray and loading the model",
            ours=size.num_images / median(ours_s),
        ),
    ]


def _time(measure: Callable[..., float], *arguments: object) -> float:
    return in_fresh_process(measure, *arguments)[0]


def _save_model(folder: Path) -> None:
    """Write the model with random weights as a folder that open_clip and the encoder load."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(MODEL, pretrained=None)
    config = {"model_cfg": open_clip.get_model_config(MODEL), "preprocess_cfg": model.visual.preprocess_cfg}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def _write_jpegs(folder: Path, count: int) -> list[tuple[str, str]]:
    """Write drawings, scaled up to `IMAGE_SIZE`; return file names and captions."""
    folder.mkdir()
    files = []
    for drawing in islice(load_drawings(), count):
        name = f"{drawing.style.name}-{drawing.concept.codepoint}.jpg"
        image = Image.open(io.BytesIO(drawing.image)).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE))
        image.save(folder / name, quality=95)
        files.append((name, f"{drawing.concept.name}, {drawing.style.title}"))
    return files


def _embed_ours(shards_uri: str, model: Path, home: Path) -> float:
    """Seconds from the call to the committed rows."""
    settings = Settings(home=home)
    store = Store(settings.index_uri, f"run-{time.time_ns()}")
    started = time.perf_counter()
    embed(corpus=Corpus(shards_uri), store=store, encoder=str(model), config=EmbedConfig(), settings=settings)
    return time.perf_counter() - started


def _embed_barely(images: Path, files: list[tuple[str, str]], model_folder: Path) -> float:
    """Seconds of the loop alone, after one batch to warm up."""
    import open_clip
    import torch
    from torch.nn.functional import normalize

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{model_folder}")
    model.eval()
    pixels_NCHW = torch.stack([preprocess(Image.open(images / name)) for name, _ in files])
    tokens_NT = open_clip.get_tokenizer(f"local-dir:{model_folder}")([caption for _, caption in files])

    def loop(pixels: torch.Tensor, tokens: torch.Tensor) -> None:
        for batch in torch.split(pixels, BATCH_SIZE):
            normalize(model.encode_image(batch), dim=-1)
        for batch in torch.split(tokens, BATCH_SIZE):
            normalize(model.encode_text(batch), dim=-1)

    with torch.inference_mode():
        loop(pixels_NCHW[:BATCH_SIZE], tokens_NT[:BATCH_SIZE])
        started = time.perf_counter()
        loop(pixels_NCHW, tokens_NT)
        return time.perf_counter() - started
