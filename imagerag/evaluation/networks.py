"""The networks through which metrics see pictures. They run on Ray workers; metrics get only their features."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from imagerag.evaluation.config import MetricFiles
from imagerag.evaluation.weights import digests_of

if TYPE_CHECKING:
    from PIL import Image

NetworkName = Literal["efficientnet", "thumbnails", "drawings", "clip", "inception", "tifa"]
Network = Callable[[Sequence["Image.Image"], Sequence[str]], npt.NDArray[np.floating[Any]]]
"""Returns features (N, D) of pictures (N,) with their prompts (N,), which only TIFA's network reads."""

_FILES: dict[NetworkName, tuple[str, ...]] = {
    "efficientnet": (),
    "thumbnails": (),
    "drawings": (),
    "clip": ("clip",),
    "inception": ("inception",),
    "tifa": ("tifa_questions", "tifa_vqa"),
}
"""The fields of `MetricFiles` that each network requires."""


def networks_of(files: MetricFiles) -> dict[NetworkName, dict[str, str]]:
    """Return the networks whose files are given, each with the digests of its files.

    Raises:
        UserError: if a file does not exist.
    """
    digests = digests_of(files)
    networks: dict[NetworkName, dict[str, str]] = {}
    for name, fields in _FILES.items():
        if all(f"files.{field}" in digests for field in fields):
            networks[name] = {field: digests[f"files.{field}"] for field in fields}
    return networks


def check_networks(files: MetricFiles) -> None:
    """Load the networks of the given files once, to fail before any picture is made.

    Raises:
        UserError: if a file is invalid.
    """
    for name in networks_of(files):
        if _FILES[name]:
            load_network(name, files)


def load_network(name: NetworkName, files: MetricFiles, device: str = "cpu") -> Network:
    """Load a network.

    Raises:
        UserError: if its files are invalid, or the package with EfficientNet-Lite0 is missing.
    """
    if name in ("efficientnet", "thumbnails"):
        from imagerag.evaluation.efficientnet import load_feature_network, to_batches, to_thumbnails

        first = load_feature_network(device)
        if name == "thumbnails":
            return lambda pictures, _: first(to_thumbnails(to_batches(pictures)))
        return lambda pictures, _: first(to_batches(pictures))
    if name == "drawings":
        from imagerag.embedded.judge import contrastive_features, load_contrastive_network
        from imagerag.evaluation.efficientnet import to_batches

        second = load_contrastive_network(device=device)
        return lambda pictures, _: contrastive_features(to_batches(pictures), second)
    if name == "tifa":
        from imagerag.evaluation.tifa import AnswerNetwork

        return AnswerNetwork(files.tifa_questions or "", files.tifa_vqa or "", device)
    from imagerag.evaluation.clip import Clip, Inception

    if name == "clip":
        clip = Clip(files.clip or "", device)
        return lambda pictures, _: clip.images(pictures)
    inception = Inception(files.inception or "", device)
    return lambda pictures, _: inception(pictures)
