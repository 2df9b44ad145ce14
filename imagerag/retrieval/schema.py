"""The schema of the index: the ids of rows, their columns, and the models that made their embeddings and features."""

import hashlib
import json
from dataclasses import asdict, dataclass
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imagerag.storage.hexadecimal import ID, SHA256

_ENCODER_KEY = b"imagerag.encoder"
_BATCH_ROWS = 8_192

FEATURE_PREFIX = "h_retr_"
FEATURE_KEY = b"imagerag.features"
_FEATURE_DIGITS = 16

Embeds = npt.NDArray[np.float32]
"""Embeddings (N, D), L2-normalised, or one of them (D,)."""
Features = npt.NDArray[np.float16]
"""A base model's features of rows (N, C, H, W), or of one row (C, H, W)."""
Fit = Literal["auto", "pad", "crop"]
"""How an image of any shape is fitted into the base model's square; see `hspace.fit`."""


@dataclass(frozen=True, kw_only=True)
class EncoderIdentity:
    """Identity of the encoder that made a table's embeddings. Embeddings of different encoders can't be compared."""

    id: str
    """Readable name of the encoder, for example `ViT-B-32/openai` or a folder."""
    digest: str
    """SHA-256 of everything that its embeddings depend on."""
    dim: int
    """Length of an embedding."""


@dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """Identity of the features in a column. Features of different identities are not interchangeable."""

    base: str
    """Readable name of the base model."""
    digest: str
    """SHA-256 of everything that the features depend on: the base model, the resolution and `fit`."""
    fit: Fit
    shape: tuple[int, int, int]
    """(C, H, W)."""

    @property
    def column(self) -> str:
        """Name of the column."""
        return f"{FEATURE_PREFIX}{self.digest[:_FEATURE_DIGITS]}"

    @property
    def presence(self) -> str:
        """Name of the boolean column that is true for rows with features; counting by it does not read the features."""
        return f"has_{self.column}"

    def to_field(self) -> pa.Field:
        """Return the Arrow field of the column."""
        return pa.field(
            self.column,
            pa.list_(pa.float16(), prod(self.shape)),
            metadata={FEATURE_KEY: json.dumps(asdict(self)).encode()},
        )


def row_id(image_sha256: str, caption: str) -> bytes:
    """Return the id of an image, of which the SHA-256 is given in hexadecimal digits, and a caption.

    The same pair has the same id, wherever and whenever it was downloaded.
    """
    assert len(image_sha256) == 64, f"not a SHA-256 in hexadecimal: {image_sha256!r}"
    digest = hashlib.blake2b(person=b"imagerag.row", digest_size=ID.byte_width)
    digest.update(image_sha256.encode())
    digest.update(caption.encode())
    return digest.digest()


def row_ids(image_sha256: pa.Array | pa.ChunkedArray, caption: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """Return `row_id` of each pair of two string columns of equal length, the digests in hexadecimal digits."""
    pairs = pa.table({"image": image_sha256, "text": caption}).to_batches(max_chunksize=_BATCH_ROWS)
    columns = (zip(batch["image"].to_pylist(), batch["text"].to_pylist(), strict=True) for batch in pairs)
    ids = [pa.array([row_id(image, text) for image, text in column], ID) for column in columns]
    return pa.chunked_array(ids, ID)


def row_schema(encoder: EncoderIdentity) -> pa.Schema:
    """Return the schema of a table with embeddings of `encoder`, which is stored in the schema's metadata.

    `image` contains the encoded image, `image_sha256` its digest. `source` and `licence` are empty if unknown. The
    embeddings are L2-normalised.
    """
    embedding = pa.list_(pa.float32(), encoder.dim)
    return pa.schema(
        [
            pa.field("id", ID, nullable=False),
            pa.field("image_sha256", SHA256, nullable=False),
            pa.field("url", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("licence", pa.string(), nullable=False),
            pa.field("caption", pa.string(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("image", pa.large_binary(), nullable=False),
            pa.field("text_embed", embedding, nullable=False),
            pa.field("image_embed", embedding, nullable=False),
        ],
        metadata={_ENCODER_KEY: json.dumps(asdict(encoder)).encode()},
    )


def encoder_of(schema: pa.Schema) -> EncoderIdentity:
    """Return the encoder that `row_schema` was called with."""
    return EncoderIdentity(**json.loads(schema.metadata[_ENCODER_KEY]))
