"""References of a prompt: which rows of the index, how near they are, and their cached features."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL.Image import Resampling

from imagerag.embedding.spec import resolve
from imagerag.errors import UserError, VersionGoneError
from imagerag.generation.spec import BaseIdentity
from imagerag.generation.text import is_text_tower
from imagerag.hspace.adapter import gate
from imagerag.hspace.features import identity_in
from imagerag.retrieval.ranking import diversify, merge, split_phrases
from imagerag.retrieval.schema import Embeds, FeatureIdentity, Features

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    from imagerag.embedding.encoder import Encoder
    from imagerag.retrieval.search import Neighbour

_MOST_OF_ONE_CAPTION = 2
_MASK_SIDE = 64
"""Of a mask; an H-space is not as fine."""
_OVERFETCH = 2
"""Rows that are fetched for each wanted one, so that there are others than those of one caption."""

R = TypeVar("R")
EncodeTexts = Callable[[Sequence[str]], Embeds | None]
"""Texts to the base model's own sentence features (N, D), L2-normalised, where it has some."""
EncodeReferences = Callable[[Sequence["Image.Image"], Sequence[str]], torch.Tensor]
"""Pictures and captions to `h_retr` (N, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where a picture comes from: one row of the index that it was given."""

    id: str
    """Of the row; empty where the reference was given as a picture."""
    caption: str
    url: str
    source: str
    licence: str
    similarity: float
    """Cosine of the caption's and the prompt's text features."""
    weight: float
    """Lambda: how much of it was used; 0 where the gate was shut."""


@dataclass(frozen=True)
class References:
    """References of a batch of B prompts, K each; what a prompt lacks is filled up with zeros."""

    rows: "tuple[tuple[Neighbour, ...], ...]"
    features: torch.Tensor
    """`h_retr` (B, K, C, H, W)."""
    similarities: torch.Tensor
    """(B, K); -1 where there is none."""
    factors: torch.Tensor | None = None
    """Of lambda (B, K), by the caller's choice."""
    masks: torch.Tensor | None = None
    """Where in the picture each is used (B, K, H, W), 0 to 1, by the caller's choice."""

    @classmethod
    def of(cls, rows: "Sequence[Sequence[Neighbour]]", h: Sequence[Sequence[torch.Tensor]]) -> "References":
        """Return the references of each prompt, with features (C, H, W) of each row."""
        most, shape = max(map(len, rows)), next(each.shape for own in h for each in own)
        features = torch.zeros(len(rows), most, *shape)
        similarities = torch.full((len(rows), most), -1.0)
        for number, (own_rows, own) in enumerate(zip(rows, h, strict=True)):
            for position, (row, each) in enumerate(zip(own_rows, own, strict=True)):
                features[number, position] = each
                similarities[number, position] = -1.0 if row.similarity is None else row.similarity
        return cls(tuple(map(tuple, rows)), features, similarities)

    def repeat_interleave(self, times: int) -> "References":
        """Return each prompt's references `times` times, one after the other."""
        return References(
            tuple(row for row in self.rows for _ in range(times)),
            self.features.repeat_interleave(times, dim=0),
            self.similarities.repeat_interleave(times, dim=0),
            None if self.factors is None else self.factors.repeat_interleave(times, dim=0),
            None if self.masks is None else self.masks.repeat_interleave(times, dim=0),
        )

    def times(self, weights: Sequence[Sequence[float]]) -> "References":
        """Return them with lambda multiplied by a weight for each.

        Raises:
            UserError: if a prompt has not as many weights as references.
        """
        factors = torch.zeros_like(self.similarities)
        for number, (own, rows) in enumerate(zip(weights, self.rows, strict=True)):
            if len(own) != len(rows):
                raise UserError(f"each reference has one weight; got {len(own)} weights for {len(rows)} references")
            factors[number, : len(own)] = torch.tensor(own)
        return replace(self, factors=factors)

    def within(self, masks: "Sequence[Sequence[Image.Image]]") -> "References":
        """Return them with a mask for each, stretched over the whole picture: white where it is used, black where not.

        Raises:
            UserError: if a prompt has not as many masks as references.
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
        """Return what each picture was given, with lambda (B, K)."""
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
    """The index of a corpus, searched by prompts, with the features of one base model.

    Attributes:
        identity: of the features; how pictures are fitted is for the index to say.
        retriever: what searches.

    Raises:
        UserError: if nothing is published, the pinned version is gone, or the index is empty.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        base: BaseIdentity,
        unet_config: Mapping[str, Any],
        text_encoder: "PreTrainedModel",
        version: int | None = None,
    ) -> None:
        """Open the index.

        Args:
            uri: of the database.
            name: of the corpus.
            base: the base model.
            unet_config: of its UNet.
            text_encoder: its own, which may be the index's as well.
            version: the pinned one; by default the published one.
        """
        from imagerag.retrieval.publish import require_version
        from imagerag.retrieval.search import Retriever  # takes a second, which only an index's users pay
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
        """Whether the base model's text encoder is the one that made the index, so that prompts are encoded once."""
        files = resolve(self.retriever.encoder.id)
        return files.text_tower is not None and is_text_tower(self._text_encoder, files.text_tower)

    def search(
        self, prompts: Sequence[str], encode_texts: EncodeTexts, k: int, *, compose: bool
    ) -> "list[list[Neighbour]]":
        """Return the `k` nearest rows of each prompt, with their features where the index has some.

        Args:
            encode_texts: the base model's, used where it `shares_encoder`.
            k: how many.
            compose: whether to search for each thing that a prompt names.

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
        found = iter([diversify(ranking, k, _MOST_OF_ONE_CAPTION) for ranking in near])
        rankings = [[next(found) for _ in own] for own in phrases]
        return [own[0] if len(own) == 1 else merge(own, k) for own in rankings]

    def fetch(
        self, ids: Sequence[Sequence[str]], prompts: Sequence[str], encode_texts: EncodeTexts
    ) -> "list[list[Neighbour]]":
        """Return the rows with these ids for each prompt. Errors as of `Retriever.fetch`."""

        def fetch_all() -> "list[list[Neighbour]]":
            embeds = self.encode(prompts, encode_texts)
            return [self.retriever.fetch(own, e, features=self.identity) for own, e in zip(ids, embeds, strict=True)]

        return self._on_what_is_there(fetch_all)

    def encode(self, texts: Sequence[str], encode_texts: EncodeTexts) -> Embeds:
        """Return texts as the index's encoder sees them (N, D)."""
        own = encode_texts(texts) if self.shares_encoder else None
        return self._encoder.encode_texts(list(texts)) if own is None else own

    def features_of(
        self, rows: "Sequence[Sequence[Neighbour]]", encode_references: EncodeReferences, *, strict: bool
    ) -> list[list[torch.Tensor]]:
        """Return `h_retr` (C, H, W) of each row; what the cache lacks is computed now, with a warning.

        Raises:
            UserError: if `strict` and some are missing, or some hold a NaN.
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
        """Return what `read` does, on the version that is published now where the one that was opened is gone.

        Raises:
            VersionGoneError: if the one that is gone is pinned.
        """
        try:
            return read()
        except VersionGoneError:
            if self._is_pinned:
                raise
        self.retriever.refresh()
        # The table may have been made anew, with another encoder and other features.
        for name in ("_encoder", "shares_encoder"):
            self.__dict__.pop(name, None)
        self.identity = self._identity()
        return read()

    def _identity(self) -> FeatureIdentity:
        return identity_in(self.retriever.dataset.schema, self._base, self._unet_config)

    def _compute(self, ids: Sequence[str], encode_references: EncodeReferences) -> dict[str, torch.Tensor]:
        from imagerag.hspace.features import open_images

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
    """Return the references that the caller chose as pictures.

    Their similarity is that of caption and prompt, or 1 where nothing can tell: who gives a picture wants it used.
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
