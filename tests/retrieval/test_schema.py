import hashlib

import pyarrow as pa
import pytest

from imagerag.retrieval.schema import EncoderIdentity, encoder_of, row_id, row_ids, row_schema

SHA = hashlib.sha256(b"image").hexdigest()


def test_row_id_is_a_function_of_image_and_caption() -> None:
    assert row_id(SHA, "a dog") == row_id(SHA, "a dog")
    assert row_id(SHA, "a dog") != row_id(SHA, "a dog ")
    assert row_id(SHA, "a dog") != row_id(hashlib.sha256(b"other").hexdigest(), "a dog")


def test_row_id_never_changes() -> None:
    """Every table out there depends on it."""
    assert row_id(SHA, "ein Hündchen") == bytes.fromhex("9a80818f9ea6f39f7e063f57c5ea8f5a98ad1507")


def test_row_id_is_domain_separated() -> None:
    assert row_id(SHA, "a dog") != hashlib.blake2b((SHA + "a dog").encode(), digest_size=20).digest()


def test_row_id_refuses_what_is_no_hash() -> None:
    with pytest.raises(AssertionError, match="not a SHA-256"):
        row_id("abc", "a dog")


def test_row_ids_equal_row_id() -> None:
    ids = row_ids(pa.array([SHA, SHA]), pa.chunked_array([["a dog"], ["a cat"]]))
    assert ids.to_pylist() == [row_id(SHA, "a dog"), row_id(SHA, "a cat")]


def test_schema_carries_the_encoder() -> None:
    encoder = EncoderIdentity(id="ViT-B-32/openai", digest="d" * 64, dim=512)
    schema = row_schema(encoder)
    assert encoder_of(schema) == encoder
    assert schema.field("text_embed").type == schema.field("image_embed").type == pa.list_(pa.float32(), 512)
