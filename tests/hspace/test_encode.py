"""A reference picture and its caption to `h_retr`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageDraw

from imagerag.base.files import BaseIdentity, resolve
from imagerag.base.model import BaseModel, load_base
from imagerag.base.text import unet_arguments
from imagerag.errors import UserError
from imagerag.hspace.cache import identity_of
from imagerag.hspace.encode import encode_latents, encode_references, feature_identity, identity_in, to_cache
from imagerag.hspace.fit import FITS, fit_square
from imagerag.retrieval.schema import Fit
from tests.generation.folders import write_lcm, write_sd, write_sdxl

SIDE = 16


@pytest.fixture(scope="module", params=[write_sd, write_sdxl, write_lcm])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    write: Callable[[Path], Path] = request.param
    return load_base(str(write(tmp_path_factory.mktemp("base"))), device="cpu")


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encode(base: BaseModel, *images: Image.Image, fit: Fit = "auto") -> torch.Tensor:
    captions = [f"picture {number}" for number in range(len(images))]
    return encode_references(base.vae, base.unet, base.conditioner, images, captions, fit)


def test_features_are_the_mid_blocks_output_at_t_0(base: BaseModel) -> None:
    images = [picture(0), picture(1)]
    seen: list[torch.Tensor] = []
    hook = base.unet.mid_block.register_forward_hook(lambda _module, _arguments, output: seen.append(output))
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images]).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = base.vae.encode(pixels / 127.5 - 1).latent_dist.mean * base.vae.config.scaling_factor
        condition = base.conditioner.encode(["picture 0", "picture 1"])
        base.unet(latents, 0, **unet_arguments(base.unet, condition, side=SIDE))
    hook.remove()
    assert torch.allclose(encode(base, *images), seen[0], atol=1e-5)


def test_the_identity_knows_the_shape_before_anything_is_loaded(base: BaseModel) -> None:
    identity = identity_of(resolve(base.identity.id), pa.schema([]))
    assert identity == feature_identity(base.identity, base.unet.config, "auto")
    assert identity.shape == tuple(encode(base, picture(0)).shape[1:])


def test_picture_and_caption_both_matter(base: BaseModel) -> None:
    h = encode(base, picture(0), picture(0), picture(1))
    assert not torch.allclose(h[0], h[1], atol=1e-3), "the caption"
    assert not torch.allclose(h[1], h[2], atol=1e-3), "the picture"


def test_any_shape_is_seen_as_its_fit_says(base: BaseModel) -> None:
    wide = Image.new("RGB", (5 * SIDE, SIDE), "red")
    wide.paste(picture(0), (2 * SIDE, 0))
    assert torch.allclose(encode(base, wide, fit="crop"), encode(base, picture(0)), atol=1e-5)
    padded = fit_square(wide, SIDE, "pad")
    assert torch.allclose(encode(base, wide, fit="pad"), encode(base, padded), atol=1e-5)
    transparent = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    white = Image.new("RGB", (SIDE, SIDE), "white")
    assert torch.allclose(encode(base, transparent), encode(base, white), atol=1e-5)


def test_tiny_sees_both_ends_of_a_wide_cut_out() -> None:
    """A red car with a blue bumper at each end, drawn from one side of its transparent ground to the other."""
    car = Image.new("RGBA", (300, 100), (0, 0, 0, 0))
    draw = ImageDraw.Draw(car)
    draw.rounded_rectangle((10, 40, 290, 80), 10, fill=(220, 20, 20))
    draw.rounded_rectangle((80, 10, 220, 50), 15, fill=(220, 20, 20))
    for left in (0, 270):
        draw.rectangle((left, 45, left + 30, 75), fill=(20, 20, 220))
    for left in (60, 190):
        draw.ellipse((left, 55, left + 45, 100), fill=(20, 20, 20))
    tiny = load_base("tiny", device="cpu")

    def columns(fit: Fit) -> torch.Tensor:
        """The bluest of each column (side,) of what the autoencoder gives back: red minus blue, -1 to 1."""
        latents = encode_latents(tiny.vae, tiny.unet, [car], fit)
        with torch.inference_mode():
            decoded = tiny.vae.decode(latents / tiny.vae.config.scaling_factor).sample[0]
        bluest: torch.Tensor = (decoded[0] - decoded[2]).amin(dim=0) / 2
        return bluest

    for fit in ("auto", "pad"):
        own = columns(fit)
        assert own[2:10].max() < -0.3, "a bumper at the left"
        assert own[-10:-2].max() < -0.3, "a bumper at the right"
        assert own[20:-20].min() > -0.3, "and none between them"
    assert columns("crop").min() > -0.3, "no bumper at all"


def test_another_base_resolution_or_fit_has_another_digest(tmp_path: Path) -> None:
    one, two = (load_base(str(write_sd(tmp_path / str(seed), seed=seed)), device="cpu") for seed in (0, 1))
    config = one.unet.config
    digests = {
        feature_identity(one.identity, config, "auto").digest,
        feature_identity(one.identity, config, "pad").digest,
        feature_identity(one.identity, config, "crop").digest,
        feature_identity(two.identity, config, "auto").digest,
        feature_identity(one.identity, {**config, "sample_size": 16}, "auto").digest,
    }
    assert len(digests) == 5
    assert feature_identity(one.identity, {**config, "sample_size": 9}, "auto").shape == (64, 5, 5)


def test_an_index_says_how_pictures_are_fitted(base: BaseModel) -> None:
    of_each = {fit: feature_identity(base.identity, base.unet.config, fit) for fit in FITS}
    stranger = feature_identity(BaseIdentity(id="stranger", digest="d" * 64), base.unet.config, "pad")
    for fit, own in of_each.items():
        found = identity_in(pa.schema([stranger.to_field(), own.to_field()]), base.identity, base.unet.config)
        assert found == of_each[fit]
    nothing = pa.schema([stranger.to_field()])
    assert identity_in(nothing, base.identity, base.unet.config) == of_each["auto"]


@pytest.mark.parametrize("bad", [float("nan"), 1e5])
def test_what_float16_cannot_hold_is_not_cached(bad: float) -> None:
    h = torch.zeros(1, 2, 2, 2)
    assert to_cache(h).dtype == np.float16
    h[0, 1, 0, 1] = bad
    with pytest.raises(UserError, match="NaN, an infinity or a number beyond 65,504"):
        to_cache(h)
