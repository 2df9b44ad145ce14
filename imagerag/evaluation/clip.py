"""Metrics whose networks the user provides as files: CLIP score, CMMD, aesthetics and FID. Nothing is downloaded."""

import tempfile
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from imagerag.embedding.encoder import to_rgb
from imagerag.errors import UserError
from imagerag.evaluation.config import MetricName
from imagerag.evaluation.distances import frechet, gaussian, mmd, spread
from imagerag.evaluation.metrics import Pictures, Real, Value, check_enough, distance_of
from imagerag.evaluation.recognition import Floats
from imagerag.evaluation.weights import load_tensors, transformers_folder

_BATCH_SIZE = 32


class Clip:
    """A CLIP model in transformers' format, used for evaluation only."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            UserError: if the folder is no transformers folder with safetensors weights.
        """
        from transformers import CLIPModel, CLIPProcessor

        path = transformers_folder("clip", folder)
        self._model = CLIPModel.from_pretrained(path, use_safetensors=True, local_files_only=True).eval().to(device)
        self._processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
        self.dim: int = self._model.config.projection_dim

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Floats:
        """Return L2-normalised image embeddings (N, D)."""
        parts = []
        for start in range(0, len(pictures), _BATCH_SIZE):
            own = [to_rgb(picture) for picture in pictures[start : start + _BATCH_SIZE]]
            pixels = self._processor(images=own, return_tensors="pt")["pixel_values"].to(self._model.device)
            parts.append(self._model.visual_projection(self._model.vision_model(pixels).pooler_output))
        return _normalized(torch.cat(parts))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Floats:
        """Return L2-normalised text embeddings (N, D)."""
        parts = []
        for start in range(0, len(texts), _BATCH_SIZE):
            own = list(texts[start : start + _BATCH_SIZE])
            tokens = self._processor(text=own, return_tensors="pt", padding=True, truncation=True)
            hidden = self._model.text_model(**tokens.to(self._model.device)).pooler_output
            parts.append(self._model.text_projection(hidden))
        return _normalized(torch.cat(parts))


def check_evaluator(folder: str, encoder_id: str) -> None:
    """Make sure that the CLIP in `folder` is not the index's encoder.

    Raises:
        UserError: if it is.
    """
    if Path(encoder_id).expanduser().absolute() == Path(folder).expanduser().absolute():
        raise UserError(f"the evaluator must not be the retriever: both are {folder}")


class Inception:
    """torch-fidelity's InceptionV3."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        """Load the network.

        Raises:
            UserError: if the file can't be read as tensors, or they are not InceptionV3's.
        """
        from torch_fidelity.utils import create_feature_extractor

        # torch-fidelity unpickles its weights file, so it receives a copy that was loaded with weights_only.
        with tempfile.NamedTemporaryFile(suffix=".pth") as safe:
            torch.save(load_tensors(path), safe.name)
            try:
                network = create_feature_extractor(
                    "inception-v3-compat", ["2048"], cuda=False, verbose=False, feature_extractor_weights_path=safe.name
                )
            except RuntimeError as error:
                raise UserError(f"files.inception must hold torch-fidelity's InceptionV3; {path}: {error}") from error
        self._network, self._device = network.to(device), device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> Floats:
        """Return the features (N, 2048) of pictures of any sizes, which the network resizes to its input size."""
        parts = [np.empty((0, 2048), np.float32)]
        for _, group in groupby(pictures, key=lambda picture: picture.size):
            alike = list(group)
            for start in range(0, len(alike), _BATCH_SIZE):
                pixels = np.stack([np.asarray(to_rgb(picture)) for picture in alike[start : start + _BATCH_SIZE]])
                inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device)
                parts.append(self._network(inputs)[0].cpu().numpy())
        return np.concatenate(parts)


class ClipScore:
    """Cosine similarity of the CLIP embeddings of picture and prompt (arXiv 2104.08718, without its factor of 2.5)."""

    name: MetricName = "clip_score"
    title = "CLIP score"
    larger_is_better = True

    def __init__(self, clip: Clip, prompts: Sequence[str]) -> None:
        self._texts = clip.texts(prompts)

    def measure(self, pictures: Pictures) -> Value:
        """Return the cosine similarity of each picture (N,)."""
        scores: Floats = (pictures.made.features("clip") * self._texts[pictures.numbers]).sum(1)
        return scores


class Cmmd:
    """Maximum mean discrepancy between CLIP embeddings of generated and real pictures (CMMD, arXiv 2401.09603)."""

    name: MetricName = "cmmd"
    title = "CMMD"
    larger_is_better = False

    def __init__(self, real: Real) -> None:
        """Initialise the distance to the real pictures.

        Raises:
            NotMeasuredError: if there are fewer than 100.
        """
        check_enough(len(real), "the index")
        self._real = real

    @cached_property
    def _spread_of_real(self) -> float:
        return spread(self._real.features("clip"), gaussian)

    def measure(self, pictures: Pictures) -> Value:
        """Return the unbiased MMD² with a Gaussian kernel of sigma 10, times 1,000, as in the paper."""
        check_enough(len(pictures.made), "each way")
        real = self._real.features("clip")
        distance = partial(mmd, other=real, kernel=gaussian, spread_of_other=self._spread_of_real)
        return distance_of(pictures, pictures.made.features("clip"), distance)


class Aesthetics:
    """LAION's aesthetic predictor: linear layers without activations on CLIP embeddings."""

    name: MetricName = "aesthetics"
    title = "aesthetics"
    larger_is_better = True

    def __init__(self, path: str, dim: int) -> None:
        """Load the head.

        Args:
            path: the head's file.
            dim: dimension D of the CLIP embeddings.

        Raises:
            UserError: if the file does not hold linear layers from D values to one.
        """
        weights = load_tensors(path)
        names = sorted((name for name in weights if name.endswith("weight")), key=_layer_of)
        layers = [(weights[name], weights.get(f"{name.removesuffix('weight')}bias")) for name in names]
        if not layers or any(w.ndim != 2 or b is None for w, b in layers) or len(layers[-1][0]) != 1:
            raise UserError(f"files.aesthetic_head must hold linear layers down to one value; {path} does not")
        if (own := layers[0][0].shape[1]) != dim:
            raise UserError(f"files.aesthetic_head takes embeddings of dimension {own}; files.clip has dimension {dim}")
        self._layers = [(w.float().numpy(), b.float().numpy()) for w, b in layers if b is not None]

    def measure(self, pictures: Pictures) -> Value:
        """Return the aesthetic score of each picture (N,), 1 to 10."""
        values = pictures.made.features("clip")
        for weight, bias in self._layers:
            values = values @ weight.T + bias
        scores: Floats = values[:, 0]
        return scores


class Fid:
    """Fréchet Inception distance between generated pictures and the index's, with torch-fidelity's InceptionV3."""

    name: MetricName = "fid"
    title = "FID"
    larger_is_better = False

    def __init__(self, real: Real) -> None:
        """Initialise the distance to the real pictures.

        Raises:
            NotMeasuredError: if there are fewer than 100.
        """
        check_enough(len(real), "the index")
        self._real = real

    def measure(self, pictures: Pictures) -> Value:
        """Return the FID with its interval."""
        check_enough(len(pictures.made), "each way")
        return distance_of(
            pictures, pictures.made.features("inception"), partial(frechet, other=self._real.features("inception"))
        )


def _layer_of(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _normalized(values: torch.Tensor) -> Floats:
    normalized: Floats = torch.nn.functional.normalize(values.float(), dim=-1).cpu().numpy()
    return normalized
