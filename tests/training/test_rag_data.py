"""An index as rows to learn from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from imagerag.errors import UserError
from imagerag.generation.base import BaseModel
from imagerag.hspace.features import encode_latents, open_images
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.training.rag_data import RagRows, load_rows
from tests.generation.with_index import BASE, CAPTIONS, drawing, encode, fill, make_pipeline, sentences, write_store
from tests.retrieval.rows import append, fixed_size_lists, index_and_publish, make_rows

HELD_OUT = ["harp", "llama"]
TWINS = ["castle", "castle"]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    pipeline = make_pipeline()
    return BaseModel(
        identity=BASE,
        vae=pipeline.vae,
        unet=pipeline.unet,
        scheduler=pipeline.scheduler,
        tokenizers=(pipeline.tokenizer,),
        text_encoders=(pipeline.text_encoder,),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Eight rows, and two more castles: one with another picture, one with the first castle's."""
    pipeline = make_pipeline()
    store = write_store(tmp_path_factory.mktemp("index"), pipeline)
    embeds = fixed_size_lists(sentences(pipeline, TWINS))
    images = [drawing(20), drawing(CAPTIONS.index("castle"))]
    rows = make_rows(
        8, 10, store.encoder, caption=["castle", "castle "], image=images, text_embed=embeds, image_embed=embeds
    )
    append(store, rows)
    fill(store, pipeline)
    index_and_publish(store)
    return store


@pytest.fixture(scope="module")
def rows(store: Store, base: BaseModel) -> RagRows:
    return load_rows(Retriever(store.uri, store.name), base, HELD_OUT, number=3)


def test_rows_are_what_the_base_model_makes_of_them(rows: RagRows, base: BaseModel) -> None:
    row = rows.captions.index("doughnut")
    image = drawing(CAPTIONS.index("doughnut"))
    assert torch.allclose(rows.latents[row], encode_latents(base.vae, base.unet, open_images([image]))[0], atol=1e-5)
    assert torch.allclose(rows.text[rows.text_of[row]], base.conditioner.encode(["doughnut"]).embeds[0], atol=1e-5)
    expected = encode(make_pipeline(), [image], ["doughnut"])[0]
    assert torch.allclose(rows.h[row].float(), expected, atol=2e-3 * float(expected.abs().max()))


def test_what_is_held_out_is_neither_learnt_nor_shown_to_what_is(rows: RagRows) -> None:
    held_out = [row for row, caption in enumerate(rows.captions) if caption in HELD_OUT]
    assert len(held_out) == 2
    assert not set(held_out) & set(rows.trained.tolist())
    assert not set(held_out) & set(rows.references[rows.trained].ravel().tolist())


def test_no_row_is_shown_itself_or_its_picture(rows: RagRows, store: Store) -> None:
    table = store.dataset().to_table(columns=["caption", "image_sha256"])
    assert tuple(table["caption"].to_pylist()) == rows.captions
    hashes = np.array(table["image_sha256"].to_pylist())
    for row, own in enumerate(rows.references):
        assert row not in own
        assert hashes[row] not in hashes[own[own >= 0]]
    first = rows.captions.index("castle")
    assert rows.captions[rows.references[first][0]] == "castle", "the other castle's picture is the nearest"


def test_rows_without_features_are_refused(tmp_path: Path, base: BaseModel) -> None:
    pipeline = make_pipeline()
    store = write_store(tmp_path, pipeline, num_rows=4)
    fill(store, pipeline)
    embeds = fixed_size_lists(sentences(pipeline, ["harp"]))
    append(store, make_rows(4, 5, store.encoder, caption=["harp"], text_embed=embeds, image_embed=embeds))
    index_and_publish(store)
    with pytest.raises(UserError, match="1 rows have no features for test: `imagerag features` makes them"):
        load_rows(Retriever(store.uri, store.name), base, [], number=3)


def test_where_all_is_held_out_there_is_nothing_to_learn(store: Store, base: BaseModel) -> None:
    with pytest.raises(UserError, match="all 10 rows are held out"):
        load_rows(Retriever(store.uri, store.name), base, [*CAPTIONS, "castle "], number=3)
