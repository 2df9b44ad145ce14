import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagerag.embedding.encoder import Encoder, UndecodableImageError, load_encoder, to_rgb
from tests.devices import DEVICES


@pytest.fixture(scope="module", params=["tiny", "folder"])
def encoder(request: pytest.FixtureRequest, encoder_folder: Path) -> Encoder:
    return load_encoder("tiny" if request.param == "tiny" else str(encoder_folder), device="cpu")


def picture(mode: str = "RGB", size: tuple[int, int] = (90, 70), seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def file_of(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(to_rgb(first)), np.asarray(to_rgb(second)))


def test_embeddings_have_unit_length_and_differ(encoder: Encoder) -> None:
    images = encoder.encode_images([picture(seed=seed) for seed in range(3)])
    texts = encoder.encode_texts(["a slice of watermelon", "a rainy day", "a happy puppy"])
    for embeds in (images, texts):
        assert embeds.shape == (3, encoder.identity.dim)
        assert embeds.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)
        assert np.max(np.triu(embeds @ embeds.T, 1)) < 0.9999


def test_alone_and_in_a_batch_are_the_same(encoder: Encoder) -> None:
    pictures = [picture(seed=seed, size=(40 + seed, 100)) for seed in range(40)]
    texts = [f"picture number {seed}" for seed in range(40)]
    np.testing.assert_allclose(
        encoder.encode_images(pictures)[[0, 33]], encoder.encode_images([pictures[0], pictures[33]]), atol=1e-5
    )
    np.testing.assert_allclose(encoder.encode_texts(texts)[33:34], encoder.encode_texts([texts[33]]), atol=1e-5)


def test_nothing_gives_nothing(encoder: Encoder) -> None:
    assert encoder.encode_texts([]).shape == encoder.encode_images([]).shape == (0, encoder.identity.dim)


def test_bytes_and_images_are_the_same(encoder: Encoder) -> None:
    png = file_of(picture(), "PNG")
    assert np.array_equal(encoder.encode_images([png]), encoder.encode_images([Image.open(io.BytesIO(png))]))


def test_long_texts_are_cut(encoder: Encoder) -> None:
    words = ["word"] * 500
    np.testing.assert_allclose(
        encoder.encode_texts([" ".join(words)]), encoder.encode_texts([" ".join([*words, "end"])]), atol=1e-6
    )


def test_preprocessing_is_open_clips(encoder_folder: Path) -> None:
    import open_clip
    import torch

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{encoder_folder}")
    with torch.inference_mode():
        expected = model.eval().encode_image(preprocess(picture()).unsqueeze(0), normalize=True).numpy()
    embeds = load_encoder(str(encoder_folder), device="cpu").encode_images([picture()])
    np.testing.assert_allclose(embeds, expected, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_is_close(encoder_folder: Path, device: str) -> None:
    full, half = load_encoder(str(encoder_folder), "cpu", "fp32"), load_encoder(str(encoder_folder), device, "bf16")
    difference = half.encode_images([picture()]) - full.encode_images([picture()])
    assert 0 < np.abs(difference).max() < 1e-2


def test_transparency_is_white() -> None:
    clear = picture("RGBA")
    clear.putalpha(0)
    white = Image.new("RGB", clear.size, "white")
    assert same(clear, white)
    assert same(clear.convert("LA"), white)
    half = picture("RGBA")
    half.putalpha(Image.linear_gradient("L").resize(half.size))
    expected = white.copy()
    expected.paste(half, mask=half.getchannel("A"))
    assert np.abs(np.asarray(to_rgb(half), int) - np.asarray(expected, int)).max() <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_grey_images_keep_their_tones() -> None:
    grey = picture("L")
    assert same(grey, grey.convert("RGB"))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert same(Image.open(io.BytesIO(file_of(deep, "PNG"))), grey)


def test_images_are_put_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise to be upright
    turned = Image.open(io.BytesIO(file_of(picture(), "PNG", exif=exif)))
    assert same(turned, picture().rotate(-90, expand=True))


def test_a_very_long_image_is_cropped(encoder: Encoder) -> None:
    assert to_rgb(Image.new("RGB", (2, 30_000))).size == (2, 32)
    assert np.isfinite(encoder.encode_images([Image.new("RGB", (30_000, 1))])).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_images_are_named(encoder: Encoder, format: str) -> None:
    whole = file_of(picture(), format)
    for broken in (whole[: len(whole) // 2], b"", b"<html>"):
        with pytest.raises(UndecodableImageError, match=r"image 1 can't be decoded: ."):
            encoder.encode_images([whole, broken])
