"""Features that the index lacks are computed, as those of given pictures are."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imagerag.embedding.encoder_files import resolve
from imagerag.errors import UserError
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.encode import feature_identity
from imagerag.hspace.fit import FITS, fit_square
from imagerag.retrieval.schema import EncoderIdentity, Fit
from imagerag.retrieval.store import Store
from tests.generation.with_index import (
    BASE,
    CAPTIONS,
    drawing,
    fill,
    latents,
    make_adapter,
    make_pipeline,
    sentences,
    write_store,
)
from tests.retrieval.rows import append, fixed_size_lists, index_and_publish, make_rows


def test_missing_features_are_computed_with_a_warning_or_refused(
    plain: ImageRAGTurboPipeline, store: Store, tmp_path: Path
) -> None:
    partial = write_store(tmp_path, plain, num_rows=6)
    fill(partial, plain)
    encoder: EncoderIdentity = resolve("tiny").identity
    embeds = fixed_size_lists(sentences(plain, CAPTIONS[6:]))
    images = [drawing(number) for number in (6, 7)]
    append(partial, make_rows(6, 8, encoder, caption=CAPTIONS[6:], image=images, text_embed=embeds, image_embed=embeds))
    index_and_publish(partial)
    pipeline = make_pipeline(make_adapter()).use_index(partial.uri, partial.name)
    whole = make_pipeline(make_adapter()).use_index(store.uri, store.name)
    with pytest.warns(UserWarning, match="1 of the references have no cached features for test yet; they are computed"):
        made = latents(pipeline, "a bicycle", num_references=1)
    assert torch.allclose(made, latents(whole, "a bicycle", num_references=1), atol=0.02)
    both = {"prompt": ["a bicycle", "a rain cloud"], "num_references": 1}
    with pytest.warns(UserWarning, match="2 of the references have no cached features"):
        made = latents(pipeline, **both)
    assert torch.allclose(made, latents(whole, **both), atol=0.02), "each its own"
    with pytest.raises(UserError, match=r"1 of the references have no cached features .*`imagerag features --name"):
        latents(pipeline, "a bicycle", num_references=1, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(pipeline, "a red dragon", num_references=1)


@pytest.mark.parametrize("fit", FITS)
def test_pictures_that_are_given_are_fitted_as_the_indexs_are(
    plain: ImageRAGTurboPipeline, tmp_path: Path, fit: Fit
) -> None:
    """Whether they are given by the caller or are rows whose features are missing."""
    wide = Image.new("RGB", (48, 16), "white")
    wide.paste(Image.open(io.BytesIO(drawing(7))).resize((32, 12)), (8, 2))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    store = write_store(tmp_path, plain, num_rows=6)
    fill(store, plain, fit)
    embeds = fixed_size_lists(sentences(plain, ["bicycle"]))
    columns = {"caption": ["bicycle"], "image": [buffer.getvalue()], "text_embed": embeds, "image_embed": embeds}
    append(store, make_rows(6, 7, resolve("tiny").identity, **columns))
    index_and_publish(store)
    pipeline = make_pipeline(make_adapter()).use_index(store.uri, store.name)
    assert pipeline.index is not None
    assert pipeline.index.identity == feature_identity(BASE, plain.unet.config, fit)

    copied: dict[str, Any] = {"fusion": "slerp", "w": 0.0}

    def given(pipeline: ImageRAGTurboPipeline, image: Image.Image) -> torch.Tensor:
        return latents(pipeline, "bicycle", reference_images=[image], reference_captions=["bicycle"], **copied)

    expected = given(plain, fit_square(wide, 16, fit))
    assert torch.allclose(given(pipeline, wide), expected, atol=1e-5)
    with pytest.warns(UserWarning, match="1 of the references have no cached features"):
        made = latents(pipeline, "bicycle", num_references=1, **copied)
    assert torch.allclose(made, expected, atol=0.01)
    other = given(plain, fit_square(wide, 16, "pad" if fit == "crop" else "crop"))
    assert not torch.allclose(expected, other, atol=0.05), "it matters"
    assert torch.allclose(given(plain, wide), given(plain, fit_square(wide, 16, "auto")), atol=1e-5), "without an index"
