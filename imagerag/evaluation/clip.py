"""Metrics by networks that have to be at hand as files: CLIP score, CMMD, aesthetics and FID. Nothing is fetched."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from imagerag.embedding.encoder import to_rgb
from imagerag.errors import UserError
from imagerag.evaluation.config import MetricName
from imagerag.evaluation.distances import frechet
from imagerag.evaluation.metrics import Pictures, Real, Value, check_enough, distance_of
from imagerag.evaluation.recognition import Floats
from imagerag.evaluation.weights import load_tensors, transformers_folder

_BATCH_SIZE = 32
_MMD_SIGMA = 10.0
_MMD_SCALE = 1000.0


class Clip:
    """A CLIP of transformers' format, which is an evaluator alone."""

    def __init__(self, folder: str, encoder_id: str) -> None:
        """Load it. Args: encoder_id: the index's encoder, which must be another one.

        Raises:
            UserError: if the folder holds no CLIP in safetensors, or the one that retrieves.
        """
        from transformers import CLIPModel, CLIPProcessor

        path = transformers_folder("clip", folder)
        if Path(encoder_id).expanduser().absolute() == path.absolute():
            raise UserError(f"the evaluator must not be the retriever: both are {folder}")
        self._model = CLIPModel.from_pretrained(path, use_safetensors=True, local_files_only=True).eval()
        self._processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
        self._last: tuple[Sequence[Image.Image], Floats] | None = None

    def images(self, pictures: Sequence[Image.Image]) -> Floats:
        """Return embeddings (N, D) of length one."""
        # Several metrics ask for the same pictures, one after the other.
        if self._last is None or self._last[0] is not pictures:
            self._last = pictures, self._embed(pictures)
        return self._last[1]

    @torch.inference_mode()
    def _embed(self, pictures: Sequence[Image.Image]) -> Floats:
        parts = []
        for start in range(0, len(pictures), _BATCH_SIZE):
            own = [to_rgb(picture) for picture in pictures[start : start + _BATCH_SIZE]]
            pixels = self._processor(images=own, return_tensors="pt")["pixel_values"]
            parts.append(self._model.visual_projection(self._model.vision_model(pixels).pooler_output))
        return _normalized(torch.cat(parts))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Floats:
        """Return embeddings (N, D) of length one."""
        tokens = self._processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return _normalized(self._model.text_projection(self._model.text_model(**tokens).pooler_output))


class ClipScore:
    """The cosine of picture and prompt by CLIP (arXiv 2104.08718, without its factor of 2.5)."""

    name: MetricName = "clip_score"
    title = "CLIP score"
    larger_is_better = True

    def __init__(self, clip: Clip, prompts: Sequence[str]) -> None:
        self._clip, self._texts = clip, clip.texts(prompts)

    def measure(self, pictures: Pictures) -> Value:
        """Return a cosine for each picture."""
        scores: Floats = (self._clip.images(pictures.made.images) * self._texts[pictures.numbers]).sum(1)
        return scores


class Cmmd:
    """Distance of CLIP's embeddings, as a whole, from those of the index's pictures (CMMD, arXiv 2401.09603)."""

    name: MetricName = "cmmd"
    title = "CMMD"
    larger_is_better = False

    def __init__(self, clip: Clip, real: Real) -> None:
        self._clip, self._real = clip, clip.images(real.images) if real.images else np.empty((0, 1), np.float32)
        self._spread = _spread(check_enough(self._real, "the index"))

    def measure(self, pictures: Pictures) -> Value:
        """Return one number, unbiased, with a Gaussian kernel of width 10, times 1,000, as in the paper."""
        own = check_enough(self._clip.images(pictures.made.images), "each way")
        return distance_of(pictures, own, self._distance)

    def _distance(self, own: Floats) -> float:
        return float(_MMD_SCALE * (_spread(own) + self._spread - 2 * _kernel(own, self._real).mean()))


class Aesthetics:
    """LAION's aesthetic predictor: a head on CLIP's embeddings, whose layers follow each other without activations."""

    name: MetricName = "aesthetics"
    title = "aesthetics"
    larger_is_better = True

    def __init__(self, clip: Clip, path: str) -> None:
        """Raises UserError if the file holds no such head."""
        weights = load_tensors(path)
        names = sorted((name for name in weights if name.endswith("weight")), key=_layer_of)
        layers = [(weights[name], weights.get(f"{name.removesuffix('weight')}bias")) for name in names]
        if not layers or any(w.ndim != 2 or b is None for w, b in layers) or len(layers[-1][0]) != 1:
            raise UserError(f"files.aesthetic_head has to hold linear layers down to one value; {path} does not")
        self._clip = clip
        self._layers = [(w.float().numpy(), b.float().numpy()) for w, b in layers if b is not None]

    def measure(self, pictures: Pictures) -> Value:
        """Return a score for each picture, 1 to 10."""
        values = self._clip.images(pictures.made.images)
        if values.shape[1] != self._layers[0][0].shape[1]:
            raise UserError(
                f"files.aesthetic_head takes embeddings of {self._layers[0][0].shape[1]}; files.clip has them of "
                f"{values.shape[1]}"
            )
        for weight, bias in self._layers:
            values = values @ weight.T + bias
        scores: Floats = values[:, 0]
        return scores


class Fid:
    """Fréchet distance of Inception's features, by torch-fidelity's network, from those of the index's pictures."""

    name: MetricName = "fid"
    title = "FID"
    larger_is_better = False

    def __init__(self, path: str, real: Real) -> None:
        """Raises UserError if the file can't be read, or holds anything but tensors."""
        from torch_fidelity.utils import create_feature_extractor

        # torch-fidelity unpickles whatever the file holds; what it is given here was read as tensors alone.
        with tempfile.NamedTemporaryFile(suffix=".pth") as safe:
            torch.save(load_tensors(path), safe.name)
            try:
                self._network = create_feature_extractor(
                    "inception-v3-compat", ["2048"], cuda=False, verbose=False, feature_extractor_weights_path=safe.name
                )
            except RuntimeError as error:
                raise UserError(f"files.inception has to hold torch-fidelity's InceptionV3; {path}: {error}") from error
        self._real = check_enough(self._features(real.images), "the index")

    def measure(self, pictures: Pictures) -> Value:
        """Return one number."""
        own = check_enough(self._features(pictures.made.images), "each way")
        return distance_of(pictures, own, partial(frechet, other=self._real))

    @torch.inference_mode()
    def _features(self, images: Sequence[Image.Image]) -> Floats:
        parts = [np.empty((0, 2048), np.float64)]
        for image in images:  # which may differ in size; the network brings each to its own
            pixels = torch.from_numpy(np.asarray(to_rgb(image)).copy()).permute(2, 0, 1)[None]
            parts.append(self._network(pixels)[0].double().numpy())
        return np.concatenate(parts)


def _layer_of(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _spread(values: Floats) -> float:
    """Return the mean kernel of different values."""
    kernel = _kernel(values, values)
    return float((kernel.sum() - len(kernel)) / (len(kernel) * (len(kernel) - 1)))


def _kernel(one: Floats, other: Floats) -> Floats:
    distances = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
    kernel: Floats = np.exp(-distances / (2 * _MMD_SIGMA**2))
    return kernel


def _normalized(values: torch.Tensor) -> Floats:
    normalized: Floats = torch.nn.functional.normalize(values, dim=-1).numpy()
    return normalized
