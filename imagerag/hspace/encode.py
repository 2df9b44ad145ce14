"""The retrieval branch: computes `h_retr` from a reference picture and its caption (paper, Sec. 3.1)."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import Image

from imagerag.base.files import BaseIdentity
from imagerag.base.text import TextConditioner, unet_arguments
from imagerag.errors import UserError
from imagerag.hspace.fit import DEFAULT_FIT, FITS, fit_square
from imagerag.hspace.midblock import encode
from imagerag.retrieval.schema import FeatureIdentity, Features, Fit

_VERSION = 2
"""Version of `encode_references`; a change gives features a new digest."""


def feature_identity(identity: BaseIdentity, unet_config: Mapping[str, Any], fit: Fit) -> FeatureIdentity:
    """Return the identity of a base model's features: digest, shape and fit, at the model's native resolution.

    Args:
        identity: id and digest of the base model.
        unet_config: configuration of its UNet.
        fit: how pictures are made square.
    """
    side, channels = unet_config["sample_size"], unet_config["block_out_channels"]
    digest = hashlib.sha256(f"{_VERSION}\0{identity.digest}\0{side}\0{fit}".encode()).hexdigest()
    deepest = -(-side // 2 ** (len(channels) - 1))
    return FeatureIdentity(base=identity.id, digest=digest, fit=fit, shape=(channels[-1], deepest, deepest))


def identity_in(schema: pa.Schema, identity: BaseIdentity, unet_config: Mapping[str, Any]) -> FeatureIdentity:
    """Return the identity of this base model's features in an index.

    Args:
        schema: schema of the index's table.
        identity: id and digest of the base model.
        unet_config: configuration of its UNet.

    Returns:
        The features that the table has, or those with the default fit if it has none.
    """
    own = {fit: feature_identity(identity, unet_config, fit) for fit in FITS}
    return next((each for each in own.values() if each.column in schema.names), own[DEFAULT_FIT])


@torch.no_grad()
def encode_references(
    vae: AutoencoderKL | AutoencoderTiny,
    unet: UNet2DConditionModel,
    conditioner: TextConditioner,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    fit: Fit,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return `h_retr` (N, C, H, W): the UNet encoder's output for the clean latents of `images` at t = 0.

    Args:
        vae: the base model's autoencoder.
        unet: the base model's UNet.
        conditioner: the base model's text encoder.
        images: pictures of any shape (N).
        captions: their captions (N).
        fit: how pictures are made square: cropped, padded, or automatically one of the two.
        device: the execution device, if weights are offloaded to another one.
    """
    arguments = unet_arguments(unet, conditioner.encode(captions, device), side=side_of(vae, unet))
    return encode(unet, encode_latents(vae, unet, images, fit, device), 0, **arguments)


@torch.no_grad()
def encode_latents(
    vae: AutoencoderKL | AutoencoderTiny,
    unet: UNet2DConditionModel,
    images: Sequence[Image.Image],
    fit: Fit,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return the clean latents `z_0` (N, C, H, W) of `images`, made square by `fit`."""
    side = side_of(vae, unet)
    pixels = torch.from_numpy(np.stack([_pixels(image, side, fit) for image in images])).to(device or vae.device)
    with in_its_range(vae):
        latents: torch.Tensor = retrieve_latents(vae.encode(pixels.to(vae.dtype)), sample_mode="argmax")
    scaled: torch.Tensor = latents * vae.config.scaling_factor
    return scaled.to(unet.dtype)


@contextmanager
def in_its_range(vae: AutoencoderKL | AutoencoderTiny) -> Iterator[None]:
    """Run a VAE whose activations overflow float16 (SDXL's) in float32 within the context, as diffusers does."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype=dtype)


def to_cache(h: torch.Tensor) -> Features:
    """Convert features (N, C, H, W) to the cached format: float16 NumPy arrays.

    Raises:
        UserError: if a value is not finite in float16.
    """
    cached: Features = h.to("cpu", torch.float16).numpy()
    if not np.isfinite(cached).all():
        raise UserError(
            "the base model's features hold a NaN, an infinity or a number beyond 65,504, and can't be cached: "
            "its weights are damaged, or it requires dtype fp32"
        )
    return cached


def open_images(images: Sequence[bytes]) -> list[Image.Image]:
    """Open encoded images with Pillow."""
    return [Image.open(io.BytesIO(image)) for image in images]


def side_of(vae: AutoencoderKL | AutoencoderTiny, unet: UNet2DConditionModel) -> int:
    """Return the base model's native resolution in pixels."""
    side: int = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    return side


def _pixels(image: Image.Image, side: int, fit: Fit) -> np.ndarray:
    """Return the square picture as an array (3, side, side), -1 to 1."""
    return (np.asarray(fit_square(image, side, fit), np.float32) / 127.5 - 1).transpose(2, 0, 1)
