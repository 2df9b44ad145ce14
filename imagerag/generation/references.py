"""References of prompts: rows of the index, their similarities and cached features."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL.Image import Resampling

from imagerag.base.files import BaseIdentity
from imagerag.base.text import is_text_tower
from imagerag.embedding.encoder_files import resolve
from imagerag.errors import UserError, VersionGoneError
from imagerag.hspace.adapter import gate
from imagerag.hspace.encode import identity_in
from imagerag.retrieval.ranking import diversify, merge, split_phrases
from imagerag.retrieval.schema import Embeds, FeatureIdentity, Features

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    from imagerag.embedding.encoder import Encoder
    from imagerag.retrieval.search import Neighbour

_MASK_SIDE = 64
"""Side of a mask; H-spaces are coarser."""
_OVERFETCH = 2
"""Rows fetched per reference, so that rows with different captions are left after diversification."""

R = TypeVar("R")
EncodeTexts = Callable[[Sequence[str]], Embeds | None]
"""Maps texts to the base model's sentence features (N, D), L2-normalised, or None if it has none."""
EncodeReferences = Callable[[Sequence["Image.Image"], Sequence[str]], torch.Tensor]
"""Maps pictures and captions to `h_retr` (N, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference that a picture was generated with."""

    id: str
    """Id of the row; empty if the reference was given as a picture."""
    caption: str
    url: str
    source: str
    licence: str
    similarity: float
    """Cosine of the caption's and the prompt's text features."""
    weight: float
    """Lambda, the reference's weight; 0 if the gate was closed."""


@dataclass(frozen=True)
class References:
    """References of a batch of B prompts, up to K each; missing ones are padded with zeros."""

    rows: "tuple[tuple[Neighbour, ...], ...]"
    features: torch.Tensor
    """`h_retr` (B, K, C, H, W)."""
    similarities: torch.Tensor
    """Similarities (B, K); -1 for padding."""
    factors: torch.Tensor | None = None
    """Factors of lambda (B, K), set by the caller."""
    masks: torch.Tensor | None = None
    """Masks of the regions where references apply (B, K, H, W), 0 to 1, set by the caller."""

    @classmethod
    def of(cls, rows: "Sequence[Sequence[Neighbour]]", h: Sequence[Sequence[torch.Tensor]]) -> "References":
        """Return the references of prompts from their rows and the features (C, H, W) of each row."""
        most, shape = max(map(len, rows)), next(each.shape for own in h for each in own)
        features = torch.zeros(len(rows), most, *shape)
        similarities = torch.full((len(rows), most), -1.0)
        for number, (own_rows, own) in enumerate(zip(rows, h, strict=True)):
            for position, (row, each) in enumerate(zip(own_rows, own, strict=True)):
                features[number, position] = each
                similarities[number, position] = -1.0 if row.similarity is None else row.similarity
        return cls(tuple(map(tuple, rows)), features, similarities)

    def repeat_interleave(self, times: int) -> "References":
        """Repeat each prompt's references `times` times, consecutively."""
        return References(
            tuple(row for row in self.rows for _ in range(times)),
            self.features.repeat_interleave(times, dim=0),
            self.similarities.repeat_interleave(times, dim=0),
            None if self.factors is None else self.factors.repeat_interleave(times, dim=0),
            None if self.masks is None else self.masks.repeat_interleave(times, dim=0),
        )

    def times(self, weights: Sequence[Sequence[float]]) -> "References":
        """Return the references with lambda multiplied by a weight per reference.

        Raises:
            UserError: if a prompt's numbers of weights and references differ.
        """
        factors = torch.zeros_like(self.similarities)
        for number, (own, rows) in enumerate(zip(weights, self.rows, strict=True)):
            if len(own) != len(rows):
                raise UserError(f"each reference has one weight; got {len(own)} weights for {len(rows)} references")
            factors[number, : len(own)] = torch.tensor(own)
        return replace(self, factors=factors)

    def within(self, masks: "Sequence[Sequence[Image.Image]]") -> "References":
        """Return the references with a mask each, resized to the whole picture: white where the reference applies.

        Raises:
            UserError: if a prompt's numbers of masks and references differ.
        """
        grids = torch.zeros(*self.similarities.shape, _MASK_SIDE, _MASK_SIDE)
        for number, (own, rows) in enumerate(zip(masks, self.rows, strict=True)):
            if len(own) != len(rows):
                raise UserError(f"each reference has one mask; got {len(own)} masks for {len(rows)} references")
            for position, mask in enumerate(own):
                grid = mask.convert("L").resize((_MASK_SIDE, _MASK_SIDE), Resampling.BOX)
                grids[number, position] = torch.from_numpy(np.asarray(grid, np.float32) / 255)
        return replace(self, masks=grids)

    def gated(self, threshold: float) -> torch.Tensor:
        """Return lambda (B, K)."""
        weights = gate(self.similarities, threshold)
        return weights if self.factors is None else weights * self.factors

    def used(self, weights: torch.Tensor) -> list[tuple[Reference, ...]]:
        """Return the references of each picture, with lambda (B, K) as their weights."""
        return [
            tuple(
                Reference(
                    id=row.id,
                    caption=row.caption,
                    url=row.url,
                    source=row.source,
                    licence=row.licence,
                    similarity=row.similarity or 0.0,
                    weight=weight,
                )
                for row, weight in zip(rows, own, strict=False)
            )
            for rows, own in zip(self.rows, weights.tolist(), strict=True)
        ]


class ReferenceIndex:
    """The index of a corpus, searched by prompts, with cached features of one base model.

    Attributes:
        identity: identity of the features, with the index's setting of how images are fitted.
        retriever: retriever of the index.

    Raises:
        UserError: if nothing is published, the pinned version is gone, or the index is empty.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        base: BaseIdentity,
        unet_config: Mapping[str, Any],
        text_encoder: "PreTrainedModel | None",
        version: int | None = None,
    ) -> None:
        """Open the index.

        Args:
            uri: URI of the database.
            name: name of the corpus.
            base: identity of the base model.
            unet_config: configuration of its UNet.
            text_encoder: its text encoder, if there is one; it may also be the index's encoder.
            version: version of the index to pin; by default the published version.
        """
        from imagerag.retrieval.publish import require_version
        from imagerag.retrieval.search import Retriever  # takes a second, needed only with an index
        from imagerag.retrieval.store import Store

        if version is not None:
            require_version(Store(uri, name), version)
        self.retriever = Retriever(uri, name, version=version)
        self._base, self._unet_config = base, unet_config
        self.identity = self._identity()
        if self.retriever.num_rows == 0:
            raise UserError(f"the index {name!r} is empty: nothing can be retrieved")
        self._name, self._is_pinned = name, version is not None
        self._text_encoder = text_encoder

    @cached_property
    def shares_encoder(self) -> bool:
        """Whether the base model's text encoder is the index's encoder, so that prompts are encoded once."""
        files = resolve(self.retriever.encoder.id)
        return files.text_tower is not None and is_text_tower(self._text_encoder, files.text_tower)

    def search(
        self, prompts: Sequence[str], encode_texts: EncodeTexts, k: int, *, compose: bool
    ) -> "list[list[Neighbour]]":
        """Return the `k` nearest rows of each prompt, with their cached features, if there are any.

        Args:
            prompts: prompts to search for.
            encode_texts: text encoding by the base model, used if it `shares_encoder`.
            k: number of rows per prompt.
            compose: whether to also search for each thing that a prompt names.

        Raises:
            UserError: if there are fewer rows than `k`, or the index has no features of this base model.
        """
        if k > self.retriever.num_rows:
            raise UserError(
                f"num_references can't be more than the index has rows: {k} of {self.retriever.num_rows} in "
                f"{self._name!r}"
            )
        phrases = [[prompt, *(split_phrases(prompt) if compose else [])] for prompt in prompts]
        queries = [phrase for own in phrases for phrase in own]
        near = self._on_what_is_there(
            lambda: self.retriever.search(self.encode(queries, encode_texts), _OVERFETCH * k, features=self.identity)
        )
        found = iter([diversify(ranking, k) for ranking in near])
        rankings = [[next(found) for _ in own] for own in phrases]
        return [own[0] if len(own) == 1 else merge(own, k) for own in rankings]

    def fetch(
        self, ids: Sequence[Sequence[str]], prompts: Sequence[str], encode_texts: EncodeTexts
    ) -> "list[list[Neighbour]]":
        """Return the rows with each prompt's ids; errors as `Retriever.fetch`."""

        def fetch_all() -> "list[list[Neighbour]]":
            embeds = self.encode(prompts, encode_texts)
            return [self.retriever.fetch(own, e, features=self.identity) for own, e in zip(ids, embeds, strict=True)]

        return self._on_what_is_there(fetch_all)

    def encode(self, texts: Sequence[str], encode_texts: EncodeTexts) -> Embeds:
        """Return embeddings of texts by the index's encoder (N, D)."""
        own = encode_texts(texts) if self.shares_encoder else None
        return self._encoder.encode_texts(list(texts)) if own is None else own

    def features_of(
        self, rows: "Sequence[Sequence[Neighbour]]", encode_references: EncodeReferences, *, strict: bool
    ) -> list[list[torch.Tensor]]:
        """Return `h_retr` (C, H, W) of each row; uncached features are computed, with a warning.

        Raises:
            UserError: if `strict` and features are missing, or if cached ones have a NaN or an infinity.
        """
        missing = list({row.id for own in rows for row in own if row.features is None})
        computed: dict[str, torch.Tensor] = {}
        if missing:
            what = f"{len(missing)} of the references have no cached features for {self.identity.base} yet"
            if strict:
                raise UserError(f"{what}: `imagerag features --name {self._name}` makes them")
            warnings.warn(f"{what}; they are computed now", stacklevel=3)
            computed = self._compute(missing, encode_references)
        return [[_checked(row, computed) for row in own] for own in rows]

    def _on_what_is_there(self, read: Callable[[], R]) -> R:
        """Return the result of `read`; if the opened version was deleted, retry on the published version.

        Raises:
            VersionGoneError: if the deleted version is pinned.
        """
        try:
            return read()
        except VersionGoneError:
            if self._is_pinned:
                raise
        self.retriever.refresh()
        # The table may have been recreated with another encoder and other features.
        for name in ("_encoder", "shares_encoder"):
            self.__dict__.pop(name, None)
        self.identity = self._identity()
        return read()

    def _identity(self) -> FeatureIdentity:
        return identity_in(self.retriever.dataset.schema, self._base, self._unet_config)

    def _compute(self, ids: Sequence[str], encode_references: EncodeReferences) -> dict[str, torch.Tensor]:
        from imagerag.hspace.encode import open_images

        found = self.retriever.fetch(ids, images=True)
        h = encode_references(open_images([row.image or b"" for row in found]), [row.caption for row in found])
        return {row.id: own.to("cpu", torch.float16) for row, own in zip(found, h, strict=True)}

    @cached_property
    def _encoder(self) -> "Encoder":
        from imagerag.embedding.encoder import load_encoder

        encoder = load_encoder(self.retriever.encoder.id)
        self.retriever.check_encoder(encoder.identity)
        return encoder


def given_references(
    prompts: Sequence[str],
    images: Sequence[Sequence["Image.Image"]],
    captions: Sequence[Sequence[str]],
    encode_texts: EncodeTexts,
    encode_references: EncodeReferences,
) -> References:
    """Return references from the caller's pictures.

    Their similarity is that of caption and prompt; without text features it is 1, so that the pictures are used.
    """
    from imagerag.retrieval.search import Neighbour

    targets = encode_texts(list(prompts)) if prompts else None
    rows, h = [], []
    for number, (own_images, own_captions) in enumerate(zip(images, captions, strict=True)):
        own = encode_texts(list(own_captions))
        near = [1.0] * len(own_captions) if own is None or targets is None else (own @ targets[number]).tolist()
        rows.append(
            [
                Neighbour(
                    id="", caption=caption, url="", source="given", licence="",
                    width=image.width, height=image.height, score=similarity, similarity=similarity,
                )
                for image, caption, similarity in zip(own_images, own_captions, near, strict=True)
            ]
        )  # fmt: skip
        h.append(list(encode_references(own_images, own_captions)))
    return References.of(rows, h)


def _checked(row: "Neighbour", computed: dict[str, torch.Tensor]) -> torch.Tensor:
    features: Features | None = row.features
    if features is None:
        return computed[row.id]
    if not np.isfinite(features).all():
        raise UserError(f"the cached features of row {row.id} ({row.caption!r}) hold a NaN or an infinity")
    return torch.from_numpy(features.copy())
