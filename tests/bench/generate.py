"""What references cost: one step at SD 2.1's size with and without them, and search with and without their features."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch._dynamo.testing import CompileCounter
from transformers import CLIPTextConfig, CLIPTextModel

from imagerag.base.files import BaseIdentity
from imagerag.embedding.encoder_files import resolve
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.hspace.encode import feature_identity
from imagerag.retrieval import feature_column
from imagerag.retrieval.ann import nearest, read_record
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, publish
from imagerag.retrieval.schema import FeatureIdentity, Features
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from tests.bench.harness import Row, Scale, alternate, median
from tests.bench.search import Vectors, make_vectors, tables
from tests.generation.folders import bytes_tokenizer

NUM_REFERENCES = 4
NUM_QUERIES = 100
NUM_ROWS: dict[Scale, int] = {"small": 6_000, "full": 1_000_000}
LIMIT_MS = 2.0
REPETITIONS: dict[Scale, int] = {"small": 1, "full": 7}
SD21_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
VIT_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
_SD21 = BaseIdentity(id="sd21", digest="2" * 64)
_TINY_SHAPE = (192, 4, 4)
_ROWS_OF_SD = 256


def run(scale: Scale, folder: Path) -> list[Row]:
    """Measure the step, then the search."""
    return [*_step(scale, folder), *_fetch(scale, folder)]


def _step(scale: Scale, folder: Path) -> list[Row]:
    """One step at 512x512, text encoded, without the autoencoder, which is the same for both."""
    pipeline = sd21()
    identity = feature_identity(_SD21, pipeline.unet.config, "auto")
    store = make_index(folder / "sd", _ROWS_OF_SD, identity)
    pipeline.use_index(store.uri, store.name)

    def measure(**arguments: object) -> float:
        generator = torch.Generator().manual_seed(0)
        started = time.perf_counter()
        pipeline("a slice of watermelon", generator=generator, output_type="latent", **arguments)
        return time.perf_counter() - started

    ways = [partial(measure, fusion="none"), partial(measure, num_references=NUM_REFERENCES, fusion="adapter")]
    for warm_up in ways:
        warm_up()
    base, ours = alternate(REPETITIONS[scale], *ways)
    return [
        Row(
            what=f"one step at 512², UNet and text encoder of SD 2.1's size, random weights, fp32: with "
            f"{NUM_REFERENCES} references (search, features, adapter)",
            unit="s",
            ours=median(ours),
            peer=median(base),
            peer_name=f"the same without references, diffusers {version('diffusers')}",
            at_most=1.02,
        ),
        graphs(pipeline),
    ]


def graphs(pipeline: ImageRAGTurboPipeline) -> Row:
    """How many graphs a step with references runs where the UNet is compiled as a whole. None would mean that it isn't.

    Args:
        pipeline: with an index; its UNet is a compiled one afterwards.
    """
    torch.compiler.reset()
    counter = CompileCounter()
    pipeline.unet = torch.compile(pipeline.unet, backend=counter, fullgraph=True)
    pipeline("a slice of watermelon", num_references=NUM_REFERENCES, fusion="adapter", output_type="latent")
    return Row(
        what=f"a step with {NUM_REFERENCES} references by torch.compile of the whole UNet: graphs that it runs",
        unit="",
        ours=counter.frame_count,
        peer=1,
        peer_name="a UNet without a break",
        at_least=1,
    )


def _fetch(scale: Scale, folder: Path) -> list[Row]:
    """Neighbours with the features of `tiny`, 6 kB each, and where the time goes."""
    num_rows = NUM_ROWS[scale]
    identity = FeatureIdentity(base="tiny", digest="1" * 64, fit="auto", shape=_TINY_SHAPE)
    store = make_index(folder / "tiny", num_rows, identity)
    retriever = Retriever(store.uri, store.name)
    record = read_record(retriever.dataset)
    assert record is not None
    queries = make_vectors(NUM_QUERIES, seed=1)[:, None]

    def find(query: Vectors, columns: Sequence[str]) -> object:
        nprobes = record.probes("text_embed", NUM_REFERENCES)
        return nearest(
            retriever.dataset, "text_embed", query, NUM_REFERENCES, columns, nprobes, is_indexed=nprobes is not None
        )

    def measure(search: Callable[[Vectors], object]) -> float:
        latencies = []
        for query in queries:
            started = time.perf_counter()
            search(query)
            latencies.append(1000 * (time.perf_counter() - started))
        return median(latencies)

    whole = partial(retriever.search, k=NUM_REFERENCES, features=identity)
    parts = {
        "without features": partial(retriever.search, k=NUM_REFERENCES),
        "search and re-ranking, ids of the rows": partial(find, columns=["id"]),
        "search and re-ranking": partial(find, columns=[]),
    }
    measure(whole)
    ours, *others = (
        median(times) for times in alternate(3, *(partial(measure, way) for way in (whole, *parts.values())))
    )
    what = f"{num_rows:,} rows: p50 of searching {NUM_REFERENCES} references with their features"
    return [
        Row(what=what, unit="ms", ours=ours, peer=LIMIT_MS, peer_name="limit", at_most=1),
        *(
            Row(what=f"of this: {name}", unit="ms", ours=own, peer=ours, peer_name="all of it")
            for name, own in zip(parts, others, strict=True)
        ),
    ]


def sd21() -> ImageRAGTurboPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD21_UNET).eval()
    adapter = HSpaceAdapter(channels=1280).eval()
    torch.nn.init.normal_(adapter.to_out.weight, std=0.02)
    return ImageRAGTurboPipeline(
        vae=AutoencoderKL(block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
                          up_block_types=("UpDecoderBlock2D",) * 4),
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear"),
        tokenizer=bytes_tokenizer(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**VIT_H)).eval(),
        adapter=adapter,
        base_id=_SD21.id,
        base_digest=_SD21.digest,
    )  # fmt: skip


def make_index(folder: Path, num_rows: int, identity: FeatureIdentity) -> Store:
    """Publish rows that are found by the embedded encoder, with features of random numbers."""
    store = Store(str(folder), "images")
    encoder = resolve("tiny").identity
    store.create(encoder)
    rows = tables(make_vectors(num_rows), encoder)
    store.commit([fragment for each in rows for fragment in store.write_fragments(each)], store.version)
    random = np.random.default_rng(0)

    def compute(images: list[bytes], captions: list[str]) -> Features:
        return random.standard_normal((len(images), *identity.shape), dtype=np.float32).astype(np.float16)

    version = feature_column.prepare(store, identity)
    for fragment in feature_column.missing(store.dataset(version), identity):
        feature_column.commit(store, [feature_column.fill(store, identity, version, fragment, compute, 512)], version)
    publication = publish(store, build_index(store, IndexConfig()), PublishConfig())
    assert publication.published, publication.checks
    return store
