"""What fine-tuning learns from: rows of an index with their latents, texts, features and references.

References are found once, as the pipeline finds them, except that a row is never its own reference, nor is another row
of the same picture.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from imagerag.errors import UserError
from imagerag.generation.base import BaseModel
from imagerag.hspace.features import encode_latents, feature_identity, open_images
from imagerag.retrieval.features import to_features
from imagerag.retrieval.ranking import diversify
from imagerag.retrieval.recall import to_numpy
from imagerag.retrieval.search import Neighbour, Retriever

MOST_OF_ONE_CAPTION = 2
_CANDIDATES = 16
_BATCH_ROWS = 64

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RagBatch:
    """Rows to learn from, and what each is shown."""

    latents: torch.Tensor
    """`z_0` (B, C, H, W)."""
    noise: torch.Tensor
    """`z_T`, of the same shape."""
    text: torch.Tensor
    """`tau(p_tgt)` (B, L, D)."""
    h_references: torch.Tensor
    """`h_retr` (B, K, C, H, W)."""
    similarities: torch.Tensor
    """(B, K); -1 where there is no reference."""

    def to(self, device: torch.device) -> "RagBatch":
        """Return the batch on `device`."""
        return RagBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ReferenceChoice:
    """How the references of a training batch are chosen."""

    number: int = 4
    none: float = 0.1
    """Share of the rows that are shown nothing, so that the model works without an index."""
    random: float = 0.2
    """Share of the rows that are shown anything, so that lambda learns to distrust a poor retrieval."""


@dataclass(frozen=True)
class RagRows:
    """Rows of an index in memory."""

    captions: tuple[str, ...]
    latents: torch.Tensor
    """(N, C, H, W)."""
    text: torch.Tensor
    """Of each caption (M, L, D)."""
    text_of: Ints
    """Which caption is each row's (N,)."""
    h: torch.Tensor
    """`h_retr` (N, C, H, W), float16."""
    embeds: torch.Tensor
    """Captions' embeddings by the index's encoder (N, D)."""
    references: Ints
    """Of each row, the best first (N, K); -1 where there are fewer."""
    trained: Ints
    """Rows to learn from: those whose captions are not held out."""

    def draw(self, size: int, references: ReferenceChoice, rng: np.random.Generator) -> RagBatch:
        """Return a random batch of what is not held out."""
        return self.batch(rng.choice(self.trained, size), references, rng)

    def batch(self, rows: Ints, references: ReferenceChoice, rng: np.random.Generator) -> RagBatch:
        """Return these rows (B,) with noise of `rng`, and references that are theirs, random or none."""
        size, k = len(rows), references.number
        chosen = self.references[rows, :k].copy()
        fate = rng.random(size)
        strangers = rng.choice(self.trained, (size, k))
        chosen = np.where((fate < references.random)[:, None], strangers, chosen)
        chosen[fate >= 1 - references.none] = -1
        chosen[chosen == rows[:, None]] = -1
        present = torch.from_numpy(chosen >= 0)
        similarities = (self.embeds[chosen] * self.embeds[rows][:, None]).sum(-1)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        latents = self.latents[rows]
        return RagBatch(
            latents=latents,
            noise=torch.randn(latents.shape, generator=generator),
            text=self.text[self.text_of[rows]],
            h_references=self.h[chosen].float() * present[:, :, None, None, None],
            similarities=torch.where(present, similarities, -1.0),
        )


def load_rows(retriever: Retriever, base: BaseModel, held_out: Collection[str], number: int) -> RagRows:
    """Read an index, and encode what it does not hold: latents and captions.

    Args:
        retriever: of an index with features of `base`.
        base: the student.
        held_out: captions that are not learnt from; they may be referred to by nothing that is.
        number: of references.

    Raises:
        UserError: if there is nothing to learn from, or rows lack features.
    """
    identity = feature_identity(base.identity, base.unet.config)
    table = retriever.read(["id", "image_sha256", "caption", "image", "text_embed", identity.column], identity)
    captions = table["caption"].to_pylist()
    h = list(to_features(table[identity.column], identity))
    lacking = sum(each is None for each in h)
    if lacking:
        raise UserError(f"{lacking} rows have no features for {identity.base}: `imagerag features` makes them")
    trained = np.flatnonzero([caption not in held_out for caption in captions])
    if len(trained) == 0:
        raise UserError(f"all {len(captions)} rows are held out: there is nothing to learn from")
    unique = sorted(set(captions))
    number_of = {caption: number for number, caption in enumerate(unique)}
    embeds = to_numpy(table["text_embed"])
    row_of = {id: row for row, id in enumerate(table["id"].to_pylist())}
    found = _candidates(retriever, {caption: embeds[row] for row, caption in enumerate(captions)})
    hashes = table["image_sha256"].to_pylist()
    learnt = set(trained.tolist())
    references = np.full((len(captions), number), -1)
    for row, caption in enumerate(captions):
        others = [
            each
            for each in found[caption]
            if hashes[row_of[each.id]] != hashes[row] and (row not in learnt or row_of[each.id] in learnt)
        ]
        own = [row_of[each.id] for each in diversify(others, number, MOST_OF_ONE_CAPTION)]
        references[row, : len(own)] = own
    return RagRows(
        captions=tuple(captions),
        latents=torch.cat(list(_latents(base, table["image"].to_pylist()))),
        text=torch.cat(list(_texts(base, unique))),
        text_of=np.array([number_of[caption] for caption in captions]),
        h=torch.from_numpy(np.stack([each for each in h if each is not None])),
        embeds=torch.from_numpy(embeds.copy()),
        references=references,
        trained=trained,
    )


def _candidates(retriever: Retriever, embeds: dict[str, npt.NDArray[np.float32]]) -> dict[str, list[Neighbour]]:
    captions = list(embeds)
    found: dict[str, list[Neighbour]] = {}
    for start in range(0, len(captions), _BATCH_ROWS):
        part = captions[start : start + _BATCH_ROWS]
        near = retriever.search(np.stack([embeds[caption] for caption in part]), min(_CANDIDATES, retriever.num_rows))
        found.update(zip(part, near, strict=True))
    return found


def _latents(base: BaseModel, images: Sequence[bytes]) -> Iterator[torch.Tensor]:
    for start in range(0, len(images), _BATCH_ROWS):
        pictures = open_images(images[start : start + _BATCH_ROWS])
        yield encode_latents(base.vae, base.unet, pictures).float().cpu().clone()


def _texts(base: BaseModel, captions: Sequence[str]) -> Iterator[torch.Tensor]:
    for start in range(0, len(captions), _BATCH_ROWS):
        yield base.conditioner.encode(captions[start : start + _BATCH_ROWS]).embeds.float().cpu()
