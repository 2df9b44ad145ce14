"""Synthetic rows for the tests of this folder."""

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from imagerag.artifacts import Publication
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, publish
from imagerag.retrieval.schema import Embeds, EncoderIdentity, row_ids, row_schema
from imagerag.retrieval.store import Store
from imagerag.storage.hexadecimal import SHA256, from_hex

DIM = 16
ENCODER = EncoderIdentity(id="encoder-a", digest="a" * 64, dim=DIM)


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def unit(vectors: np.ndarray[Any, Any]) -> Embeds:
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def embeddings(start: int, stop: int, dim: int, *, salt: int = 0) -> Embeds:
    """Of rows number `start` to `stop`, around 200 centres, as the embeddings of real data lie."""
    centres = np.random.default_rng((salt, 0)).standard_normal((200, dim))
    spread = 0.4 * np.random.default_rng((salt, 1)).standard_normal((stop, dim))
    centre_of = np.random.default_rng((salt, 2)).integers(0, 200, stop)
    return unit((centres[centre_of] + spread)[start:])


def fixed_size_lists(vectors: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])


def make_rows(start: int, stop: int, encoder: EncoderIdentity = ENCODER, **columns: Sequence[Any]) -> pa.Table:
    """Rows number `start` to `stop`; the same number is the same row. `columns` replaces whole columns."""
    numbers = range(start, stop)
    captions = columns.get("caption", [f"picture number {i}" for i in numbers])
    images = columns.get("image", [png((i % 256, i // 256 % 256, 7)) for i in numbers])
    hashes = pa.array([hashlib.sha256(image).hexdigest() for image in images])
    data = {
        "id": row_ids(hashes, pa.array(captions)),
        "image_sha256": from_hex(hashes.to_pylist(), SHA256),
        "url": [f"https://example.org/{i}.png" for i in numbers],
        "source": ["even" if i % 2 == 0 else "odd" for i in numbers],
        "licence": ["CC0-1.0"] * len(numbers),
        "caption": captions,
        "width": [4] * len(numbers),
        "height": [4] * len(numbers),
        "image": images,
        "text_embed": fixed_size_lists(embeddings(start, stop, encoder.dim)),
        "image_embed": fixed_size_lists(embeddings(start, stop, encoder.dim, salt=1)),
    }
    return pa.table(data | columns, schema=row_schema(encoder))


def append(store: Store, rows: pa.Table) -> int:
    with store.writer_lock():
        version = store.version
        return store.commit(store.write_fragments(rows), version)


def index_and_publish(store: Store, config: PublishConfig | None = None) -> Publication:
    return publish(store, build_index(store, IndexConfig()), config or PublishConfig())
