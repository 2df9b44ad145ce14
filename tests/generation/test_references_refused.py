"""What the pipeline with an index refuses, by a message that names the rule and the value."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagerag.errors import UserError
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.encode import feature_identity
from imagerag.retrieval import feature_column
from imagerag.retrieval.schema import Features
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import remove_rows
from imagerag.storage.hexadecimal import to_hex
from tests.generation.with_index import BASE, fill, make_pipeline, write_store
from tests.retrieval.rows import index_and_publish

NARROW = Image.new("RGB", (4, 400))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(plain: ImageRAGTurboPipeline, tmp_path: Path, value: float) -> None:
    broken = write_store(tmp_path, plain)
    identity = feature_identity(BASE, plain.unet.config, "auto")
    version = feature_column.prepare(broken, identity)

    def compute(images: list[bytes], captions: list[str]) -> Features:
        return np.full((len(images), *identity.shape), value, np.float16)

    feature_column.commit(broken, [feature_column.fill(broken, identity, version, 0, compute, 8)], version)
    index_and_publish(broken)
    with pytest.raises(UserError, match=r"features of row [0-9a-f]{40} \('castle'\) hold a NaN"):
        make_pipeline().use_index(broken.uri, broken.name)("a castle")


def test_an_index_whose_rows_were_all_taken_down_is_refused(plain: ImageRAGTurboPipeline, tmp_path: Path) -> None:
    small = write_store(tmp_path, plain, num_rows=1)
    fill(small, plain)
    index_and_publish(small)
    remove_rows(small, ids=to_hex(small.ids()))
    with pytest.raises(UserError, match="the index 'images' is empty: nothing can be retrieved"):
        make_pipeline().use_index(small.uri, small.name)


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ("", {}, "a prompt says what to make a picture of; got ''"),
        (["a castle", " "], {}, "got ' '"),
        ("x" * 10_000, {}, "at most 2,000 characters; one has 10,000"),
        ("a castle", {"num_references": 9}, "9 of 8 in 'images'"),
        ("a castle", {"num_references": -1}, "between 0 and 64; got -1"),
        ("a castle", {"fusion": "blend"}, "fusion is one of adapter, slerp, none; got 'blend'"),
        ("a castle", {"w": 1.5, "fusion": "slerp"}, "between -1 and 1; got 1.5"),
        ("a castle", {"adapter_scale": -0.1}, "what the adapter adds, must be between 0 and 10; got -0.1"),
        ("a castle", {"adapter_scale": 10.5}, "between 0 and 10; got 10.5"),
        ("a castle", {"adapter_scale": float("nan")}, "between 0 and 10; got nan"),
        ("a castle", {"adapter_scale": float("inf")}, "between 0 and 10; got inf"),
        ("a castle", {"similarity_threshold": 2}, "a cosine, so between -1 and 1; got 2"),
        ("a castle", {"reference_ids": ["nobody"]}, "an id has 40 hexadecimal digits, got 'nobody'"),
        ("a castle", {"reference_ids": ["0b" * 20]}, "has no row with the id '0b0b"),
        ("a castle", {"reference_ids": []}, "reference_ids is empty"),
        ("a castle", {"reference_ids": [["a"], ["b"]]}, "one list for each of the 1 prompts; got 2"),
        ("a castle", {"reference_captions": ["a"]}, "say what reference_images show; got captions alone"),
        ("a castle", {"reference_images": np.zeros((8, 8, 3))}, "a PIL image, .*; got numpy.ndarray"),
        ("a castle", {"reference_images": NARROW, "reference_captions": ["a", "b"]}, "got 2 captions, 'a' …, for 1"),
        ("a castle", {"reference_weights": [1.0, 2.0], "num_references": 1}, "got 2 weights for 1 references"),
        ("a castle", {"reference_weights": -1, "num_references": 1}, "weight must be between 0 and 10; got -1"),
        ("a castle", {"reference_weights": 10.5, "num_references": 1}, "weight must be between 0 and 10; got 10.5"),
        ("a castle", {"reference_masks": [NARROW] * 2, "num_references": 1}, "got 2 masks for 1 references"),
        ("a castle", {"reference_masks": [1.0], "num_references": 1}, "reference_masks is a PIL image, .*float"),
        ("a castle", {"reference_ids": ["0b" * 20], "reference_images": NARROW}, "or as reference_images, not both"),
        ("a castle", {"reference_images": [[]]}, "reference_images is a PIL image, .*; got an empty list"),
        (None, {"prompt_embeds": torch.zeros(1, 4, 384), "reference_images": NARROW}, "captions have to say what"),
        ("a castle", {"query": ["a", "b"]}, "one for each of the 1; got 2"),
        ("a castle", {"reference_images": [NARROW], "reference_captions": ["a"]}, r"one has \(4, 400\)"),
    ],
)  # fmt: skip
def test_bad_input(pipe: ImageRAGTurboPipeline, prompt: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(prompt, **arguments)


def test_an_adapter_or_an_index_that_is_not_there(plain: ImageRAGTurboPipeline, store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs an adapter, and this pipeline has none"):
        make_pipeline().use_index(store.uri, store.name)("a castle", fusion="adapter")
    with pytest.raises(UserError, match="references come from an index"):
        plain("a castle", fusion="slerp")
    with pytest.raises(UserError, match="there is no table 'images'"):
        make_pipeline().use_index(str(tmp_path), "images")
    Store(str(tmp_path), "early").open_or_create(store.encoder)
    with pytest.raises(UserError, match="version 1 of 'early' was made before its first index"):
        make_pipeline().use_index(str(tmp_path), "early", 1)
    with pytest.raises(UserError, match="made from its parts is not known: load it from a folder"):
        make_pipeline(base_digest=None).use_index(store.uri, store.name)


def test_an_index_that_can_not_be_used_leaves_the_one_before(store: Store, tmp_path: Path) -> None:
    pipeline = make_pipeline().use_index(store.uri, store.name)
    before = pipeline.index
    with pytest.raises(UserError):
        pipeline.use_index(str(tmp_path), "missing", 3)
    assert pipeline.index is before
    assert (pipeline.config.index_uri, pipeline.config.index_name) == (store.uri, store.name)
    assert pipeline.config.index_version is None
