"""The CLIP encoder: embeds images and texts into one space, identically for the index and for queries."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from imagerag.embedded import tiny_encoder
from imagerag.embedding import encoder_files as specs
from imagerag.images import upright_srgb
from imagerag.retrieval.schema import EncoderIdentity
from imagerag.workers import Dtype

if TYPE_CHECKING:
    import open_clip
    import torch

T = TypeVar("T")
Embeddings = np.ndarray[tuple[int, int], np.dtype[np.float32]]

_MAX_ASPECT = 16
"""Maximum aspect ratio; longer images are centre-cropped, because resizing the short side would make the long one huge.
"""


class UndecodableImageError(ValueError):
    """An image is corrupt or truncated."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index = index
        """Position of the image in the input list."""
        self.reason = reason

    def __str__(self) -> str:
        return f"image {self.index} can't be decoded: {self.reason}"


class Encoder:
    """An open_clip model with its preprocessing and tokenizer, created by `load_encoder`.

    Embeddings are L2-normalised. They depend on the batch by up to 1e-5 per value in fp32 and 1e-2 in half precision,
    because of the order of summation in matrix products.
    """

    def __init__(
        self,
        model: "open_clip.CLIP | open_clip.CustomTextCLIP",
        tokenizer: Callable[[list[str]], "torch.Tensor"],
        *,
        identity: EncoderIdentity,
        device: str,
        dtype: Dtype,
    ) -> None:
        import torch
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.identity = identity
        self.device = torch.device(device)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        self._model = model.eval().requires_grad_(False).to(self.device)
        self._tokenizer = tokenizer
        transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
        # The last two steps (to tensor, normalise) are cheaper for a whole batch than per image.
        *self._resize, _, self._normalize = transform.transforms
        self._batch_size = 32 if self.device.type == "cpu" else 256
        self._decoders = ThreadPoolExecutor(os.cpu_count())

    def encode_images(self, images: Sequence[Image.Image | bytes]) -> Embeddings:
        """Return embeddings (N, D) of images or encoded images.

        Decoding in threads overlaps with the computation of earlier batches.

        Raises:
            UndecodableImageError: if an image is corrupt or truncated.
        """
        pixels = self._decoders.map(self._preprocess, range(len(images)), images)
        return self._encode(self._encode_pixels, _batched(pixels, self._batch_size))

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Return embeddings (N, D) of texts, truncated to the model's context length."""
        return self._encode(self._encode_strings, _batched(texts, self._batch_size))

    def _encode(self, encode: Callable[[list[T]], "torch.Tensor"], batches: Iterator[list[T]]) -> Embeddings:
        import torch

        half = self._dtype != torch.float32
        embeddings = [np.empty((0, self.identity.dim), np.float32)]
        with torch.inference_mode(), torch.autocast(self.device.type, self._dtype, enabled=half):
            for batch in batches:
                features = torch.nn.functional.normalize(encode(batch).float(), dim=-1)
                embeddings.append(features.cpu().numpy())
        return np.concatenate(embeddings)

    def _encode_pixels(self, batch: list[np.ndarray]) -> "torch.Tensor":
        import torch

        pixels = torch.from_numpy(np.stack(batch)).to(self.device).permute(0, 3, 1, 2)  # (B, H, W, 3) to (B, 3, H, W)
        features: torch.Tensor = self._model.encode_image(self._normalize(pixels / 255))
        return features

    def _encode_strings(self, batch: list[str]) -> "torch.Tensor":
        features: torch.Tensor = self._model.encode_text(self._tokenizer(batch).to(self.device))
        return features

    def _preprocess(self, index: int, image: Image.Image | bytes) -> np.ndarray:
        """Return the resized and cropped pixels of one image as bytes (H, W, 3)."""
        try:
            opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
            pixels = to_rgb(opened)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UndecodableImageError(index, str(error)) from error
        for step in self._resize:
            pixels = step(pixels)
        return np.asarray(pixels)


def load_encoder(spec: str, device: str | None = None, dtype: Dtype | None = None) -> Encoder:
    """Load an encoder.

    Args:
        spec: `tiny`, an open_clip name and pretrained tag (`ViT-B-32/laion2b_s34b_b79k`), a hub id and full commit
            (`hf-hub:org/name@<40 hexadecimal digits>`), or a folder in open_clip's `local-dir` format.
        device: a torch device; by default the GPU, if there is one.
        dtype: dtype of matrix products (autocast); by default fp32 on CPUs and fp16 elsewhere.

    Raises:
        UserError: if the encoder does not exist, or its weights are not safetensors.
    """
    import open_clip
    import torch

    files = specs.resolve(spec)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("fp32" if torch.device(device).type == "cpu" else "fp16")
    if spec == specs.TINY:
        model, tokenizer = tiny_encoder.load_model(), tiny_encoder.load_tokenizer()
    else:
        model = open_clip.create_model(f"local-dir:{files.folder}", require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{files.folder}")
    return Encoder(model, tokenizer, identity=files.identity, device=device, dtype=dtype)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` upright in sRGB, centre-cropped to an aspect ratio of at most 16."""
    image = upright_srgb(image)
    width, height = (min(side, _MAX_ASPECT * min(image.size)) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
