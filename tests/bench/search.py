"""Search latency, recall and build time at several table sizes, beside faiss-cpu on the same vectors."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, publish
from imagerag.retrieval.schema import EncoderIdentity, row_schema
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.storage.hexadecimal import ID, SHA256, from_hex
from tests.bench.harness import Row, Scale, alternate, median

K = 10
DIM = 384
NUM_QUERIES = 100
NUM_CLUSTERS = 1000
REPETITIONS = 3
NUM_ROWS: dict[Scale, tuple[int, ...]] = {"small": (1_000, 20_000), "full": (1_000, 100_000, 1_000_000)}
HNSW_LINKS = 32
HNSW_EF = (16, 32, 64, 128, 256, 512, 1024)

_ENCODER = EncoderIdentity(id="synthetic", digest="0" * 64, dim=DIM)
_LATENT_DIM = 48
_CHUNK_ROWS = 50_000
_FRAGMENT_ROWS = 2_048
_IMAGE = bytes(1000)

Vectors = npt.NDArray[np.float32]
Search = Callable[[Vectors], list[int]]
"""From one query (1, D) to the positions of its `K` neighbours, nearest first."""


@dataclass(frozen=True)
class Engine:
    """Vectors made searchable."""

    build_s: float
    search: Search


@dataclass(frozen=True)
class Found:
    """What one pass over the queries gave."""

    latencies_ms: list[float]
    recall: float


def run(scale: Scale, folder: Path) -> list[Row]:
    """Compare at each size, both with all cores."""
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    return [row for num_rows in NUM_ROWS[scale] for row in _compare(num_rows, Store(str(folder), f"rows-{num_rows}"))]


def make_vectors(num_rows: int, seed: int = 0) -> Vectors:
    """Return unit vectors (N, `DIM`) in `NUM_CLUSTERS` clusters, most of whose variance lies in 48 directions.

    Embeddings of real data are like that: points spread evenly over all directions would have no near neighbours.
    """
    shape = np.random.default_rng(0)
    directions = shape.standard_normal((_LATENT_DIM, DIM), dtype=np.float32)
    centres = shape.standard_normal((NUM_CLUSTERS, _LATENT_DIM), dtype=np.float32)
    random = np.random.default_rng((1, seed))
    vectors = np.empty((num_rows, DIM), np.float32)
    for start in range(0, num_rows, _CHUNK_ROWS):
        chunk = vectors[start : start + _CHUNK_ROWS]
        latents = centres[random.integers(NUM_CLUSTERS, size=len(chunk))]
        latents += 0.5 * random.standard_normal(latents.shape, dtype=np.float32)
        chunk[:] = latents @ directions + 0.3 * random.standard_normal(chunk.shape, dtype=np.float32)
        chunk /= np.linalg.norm(chunk, axis=1, keepdims=True)
    return vectors


def _compare(num_rows: int, store: Store) -> Iterator[Row]:
    vectors, queries = make_vectors(num_rows), make_vectors(NUM_QUERIES, seed=1)
    ours = _ours(store, vectors)
    flat = _faiss(faiss.IndexFlatIP(DIM), vectors)
    graph = faiss.IndexHNSWFlat(DIM, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    hnsw = _faiss(graph, vectors)
    exact = [flat.search(query) for query in queries[:, None]]
    measures = [partial(_search_all, engine.search, queries, exact) for engine in (ours, flat, hnsw)]

    target = measures[0]().recall  # the first pass also warms the caches
    for ef in HNSW_EF:
        graph.hnsw.efSearch = ef
        if measures[2]().recall >= target:
            break
    found_ours, found_flat, found_hnsw = alternate(REPETITIONS, *measures)

    faiss_name = f"faiss {version('faiss-cpu')}"
    hnsw_name = f"{faiss_name} HNSW (M={HNSW_LINKS}, efSearch={ef})"
    latency = partial(Row, what=f"{num_rows:,} rows: search p50", unit="ms", ours=_p50(found_ours))
    yield latency(peer=_p50(found_flat), peer_name=f"{faiss_name} flat")
    yield latency(peer=_p50(found_hnsw), peer_name=hnsw_name)
    yield Row(
        what=f"{num_rows:,} rows: recall@{K}",
        unit="",
        ours=found_ours[0].recall,
        peer=found_hnsw[0].recall,
        peer_name=hnsw_name,
    )
    yield Row(
        what=f"{num_rows:,} rows: write, index (two vector columns, words), measure and publish",
        unit="s",
        ours=ours.build_s,
        peer=hnsw.build_s,
        peer_name=f"{faiss_name} HNSW, one vector column",
    )


def _ours(store: Store, vectors: Vectors) -> Engine:
    started = time.perf_counter()
    store.create(_ENCODER)
    fragments = [fragment for chunk in tables(vectors) for fragment in store.write_fragments(chunk)]
    store.commit(fragments, store.version)
    publication = publish(store, build_index(store, IndexConfig()), PublishConfig())
    assert publication.published, publication.checks
    build_s = time.perf_counter() - started
    retriever = Retriever(store.uri, store.name)
    return Engine(build_s, lambda query: [int(neighbour.id, 16) for neighbour in retriever.search(query, K)[0]])


def tables(vectors: Vectors, encoder: EncoderIdentity = _ENCODER) -> Iterator[pa.Table]:
    """The rows of a table, whose ids are the vectors' positions, in pieces of a fragment's size."""
    for start in range(0, len(vectors), _FRAGMENT_ROWS):
        chunk = vectors[start : start + _FRAGMENT_ROWS]
        numbers = range(start, start + len(chunk))
        embeds = pa.FixedSizeListArray.from_arrays(pa.array(chunk.ravel()), DIM)
        columns = {
            "id": from_hex([f"{number:040x}" for number in numbers], ID),
            "image_sha256": from_hex([f"{number:064x}" for number in numbers], SHA256),
            "url": [f"https://images.example/{number}.jpg" for number in numbers],
            "source": ["images.example"] * len(chunk),
            "licence": ["CC0-1.0"] * len(chunk),
            "caption": [f"picture number {number}" for number in numbers],
            "width": [64] * len(chunk),
            "height": [64] * len(chunk),
            "image": [_IMAGE] * len(chunk),
            "text_embed": embeds,
            "image_embed": embeds,
        }
        yield pa.table(columns, schema=row_schema(encoder))


def _faiss(index: "faiss.Index", vectors: Vectors) -> Engine:
    started = time.perf_counter()
    index.add(vectors)
    return Engine(time.perf_counter() - started, lambda query: index.search(query, K)[1][0].tolist())


def _search_all(search: Search, queries: Vectors, exact: list[list[int]]) -> Found:
    """Search one query at a time."""
    latencies_ms, num_found = [], 0
    for query, expected in zip(queries[:, None], exact, strict=True):
        started = time.perf_counter()
        neighbours = search(query)
        latencies_ms.append(1000 * (time.perf_counter() - started))
        num_found += len(set(neighbours) & set(expected))
    return Found(latencies_ms, num_found / (K * len(queries)))


def _p50(passes: list[Found]) -> float:
    return median([latency for found in passes for latency in found.latencies_ms])
