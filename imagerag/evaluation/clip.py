"""Metrics whose networks the user provides as files: CLIP score, CMMD, aesthetics and FID. Nothing is downloaded."""

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
    """A CLIP model in transformers' format, used for evaluation only."""

    def __init__(self, folder: str, encoder_id: str) -> None:
        """Load the model.

        Args:
            folder: a transformers folder with safetensors weights.
            encoder_id: the index's encoder, which must not be the evaluator.

        Raises:
            UserError: if the folder holds no CLIP in safetensors, or is the index's encoder.
        """
        from transformers import CLIPModel, CLIPProcessor

        path = transformers_folder("clip", folder)
        if Path(encoder_id).expanduser().absolute() == path.absolute():
            raise UserError(f"the evaluator must not be the retriever: both are {folder}")
        self._model = CLIPModel.from_pretrained(path, use_safetensors=True, local_files_only=True).eval()
        self._processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
        self._last: tuple[Sequence[Image.Image], Floats] | None = None

    def images(self, pictures: Sequence[Image.Image]) -> Floats:
        """Return L2-normalised image embeddings (N, D)."""
        # Several metrics need the embeddings of the same pictures in turn.
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
        """Return L2-normalised text embeddings (N, D)."""
        tokens = self._processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return _normalized(self._model.text_projection(self._model.text_model(**tokens).pooler_output))


class ClipScore:
    """Cosine similarity of the CLIP embeddings of picture and prompt (arXiv 2104.08718, without its factor of 2.5)."""

    name: MetricName = "clip_score"
    title = "CLIP score"
    larger_is_better = True

    def __init__(self, clip: Clip, prompts: Sequence[str]) -> None:
        self._clip, self._texts = clip, clip.texts(prompts)

    def measure(self, pictures: Pictures) -> Value:
        """Return the cosine similarity of each picture (N,)."""
        scores: Floats = (self._clip.images(pictures.made.images) * self._texts[pictures.numbers]).sum(1)
        return scores


class Cmmd:
    """Maximum mean discrepancy between CLIP embeddings of generated and real pictures (CMMD, arXiv 2401.09603)."""

    name: MetricName = "cmmd"
    title = "CMMD"
    larger_is_better = False

    def __init__(self, clip: Clip, real: Real) -> None:
        self._clip, self._real = clip, clip.images(real.images) if real.images else np.empty((0, 1), np.float32)
        self._spread = _spread(check_enough(self._real, "the index"))

    def measure(self, pictures: Pictures) -> Value:
        """Return the unbiased MMD² with a Gaussian kernel of sigma 10, times 1,000, as in the paper."""
        own = check_enough(self._clip.images(pictures.made.images), "each way")
        return distance_of(pictures, own, self._distance)

    def _distance(self, own: Floats) -> float:
        return float(_MMD_SCALE * (_spread(own) + self._spread - 2 * _kernel(own, self._real).mean()))


class Aesthetics:
    """LAION's aesthetic predictor: linear layers without activations on CLIP embeddings."""

    name: MetricName = "aesthetics"
    title = "aesthetics"
    larger_is_better = True

    def __init__(self, clip: Clip, path: str) -> None:
        """Load the head.

        Raises:
            UserError: if the file does not hold linear layers that end in one value.
        """
        weights = load_tensors(path)
        names = sorted((name for name in weights if name.endswith("weight")), key=_layer_of)
        layers = [(weights[name], weights.get(f"{name.removesuffix('weight')}bias")) for name in names]
        if not layers or any(w.ndim != 2 or b is None for w, b in layers) or len(layers[-1][0]) != 1:
            raise UserError(f"files.aesthetic_head must hold linear layers down to one value; {path} does not")
        self._clip = clip
        self._layers = [(w.float().numpy(), b.float().numpy()) for w, b in layers if b is not None]

    def measure(self, pictures: Pictures) -> Value:
        """Return the aesthetic score of each picture (N,), 1 to 10."""
        values = self._clip.images(pictures.made.images)
        if values.shape[1] != self._layers[0][0].shape[1]:
            raise UserError(
                f"files.aesthetic_head takes embeddings of dimension {self._layers[0][0].shape[1]}; files.clip has "
                f"dimension {values.shape[1]}"
            )
        for weight, bias in self._layers:
            values = values @ weight.T + bias
        scores: Floats = values[:, 0]
        return scores


class Fid:
    """Fréchet Inception distance between generated pictures and the index's, with torch-fidelity's InceptionV3."""

    name: MetricName = "fid"
    title = "FID"
    larger_is_better = False

    def __init__(self, path: str, real: Real) -> None:
        """Load the network and compute the features of the real pictures.

        Raises:
            UserError: if the file can't be read as tensors, or they are not InceptionV3's.
        """
        from torch_fidelity.utils import create_feature_extractor

        # torch-fidelity unpickles its weights file, so it receives a copy that was loaded with weights_only.
        with tempfile.NamedTemporaryFile(suffix=".pth") as safe:
            torch.save(load_tensors(path), safe.name)
            try:
                self._network = create_feature_extractor(
                    "inception-v3-compat", ["2048"], cuda=False, verbose=False, feature_extractor_weights_path=safe.name
                )
            except RuntimeError as error:
                raise UserError(f"files.inception must hold torch-fidelity's InceptionV3; {path}: {error}") from error
        self._real = check_enough(self._features(real.images), "the index")

    def measure(self, pictures: Pictures) -> Value:
        """Return the FID with its interval."""
        own = check_enough(self._features(pictures.made.images), "each way")
        return distance_of(pictures, own, partial(frechet, other=self._real))

    @torch.inference_mode()
    def _features(self, images: Sequence[Image.Image]) -> Floats:
        parts = [np.empty((0, 2048), np.float64)]
        for image in images:  # one at a time, as sizes may differ; the network resizes each to its input size
            pixels = torch.from_numpy(np.asarray(to_rgb(image)).copy()).permute(2, 0, 1)[None]
            parts.append(self._network(pixels)[0].double().numpy())
        return np.concatenate(parts)


def _layer_of(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _spread(values: Floats) -> float:
    """Return the mean kernel value over pairs of different embeddings."""
    kernel = _kernel(values, values)
    return float((kernel.sum() - len(kernel)) / (len(kernel) * (len(kernel) - 1)))


def _kernel(one: Floats, other: Floats) -> Floats:
    distances = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
    kernel: Floats = np.exp(-distances / (2 * _MMD_SIGMA**2))
    return kernel


def _normalized(values: torch.Tensor) -> Floats:
    normalized: Floats = torch.nn.functional.normalize(values, dim=-1).numpy()
    return normalized
