"""A reference picture and its caption to `h_retr`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagerag.errors import UserError
from imagerag.generation.base import BaseModel, load_base
from imagerag.generation.spec import resolve
from imagerag.generation.text import unet_arguments
from imagerag.hspace.features import encode_references, feature_identity, to_cache
from imagerag.hspace.job import identity_of
from tests.generation.folders import write_lcm, write_sd, write_sdxl

SIDE = 16


@pytest.fixture(scope="module", params=[write_sd, write_sdxl, write_lcm])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    write: Callable[[Path], Path] = request.param
    return load_base(str(write(tmp_path_factory.mktemp("base"))), device="cpu")


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encode(base: BaseModel, *images: Image.Image) -> torch.Tensor:
    captions = [f"picture {number}" for number in range(len(images))]
    return encode_references(base.vae, base.unet, base.conditioner, images, captions)


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
    identity = identity_of(resolve(base.identity.id))
    assert identity == feature_identity(base.identity, base.unet.config)
    assert identity.shape == tuple(encode(base, picture(0)).shape[1:])


def test_picture_and_caption_both_matter(base: BaseModel) -> None:
    h = encode(base, picture(0), picture(0), picture(1))
    assert not torch.allclose(h[0], h[1], atol=1e-3), "the caption"
    assert not torch.allclose(h[1], h[2], atol=1e-3), "the picture"


def test_any_shape_is_seen_by_its_middle_on_white(base: BaseModel) -> None:
    wide = Image.new("RGB", (5 * SIDE, SIDE), "red")
    wide.paste(picture(0), (2 * SIDE, 0))
    assert torch.allclose(encode(base, wide), encode(base, picture(0)), atol=1e-5)
    transparent = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    white = Image.new("RGB", (SIDE, SIDE), "white")
    assert torch.allclose(encode(base, transparent), encode(base, white), atol=1e-5)


def test_another_base_or_resolution_has_another_digest(tmp_path: Path) -> None:
    one, two = (load_base(str(write_sd(tmp_path / str(seed), seed=seed)), device="cpu") for seed in (0, 1))
    config = one.unet.config
    digests = {
        feature_identity(one.identity, config).digest,
        feature_identity(two.identity, config).digest,
        feature_identity(one.identity, {**config, "sample_size": 16}).digest,
    }
    assert len(digests) == 3
    assert feature_identity(one.identity, {**config, "sample_size": 9}).shape == (64, 5, 5)


@pytest.mark.parametrize("bad", [float("nan"), 1e5])
def test_what_float16_cannot_hold_is_not_cached(bad: float) -> None:
    h = torch.zeros(1, 2, 2, 2)
    assert to_cache(h).dtype == np.float16
    h[0, 1, 0, 1] = bad
    with pytest.raises(UserError, match="NaN, an infinity or a number beyond 65,504"):
        to_cache(h)
