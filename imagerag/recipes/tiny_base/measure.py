"""Metrics of `imagerag.recipes.tiny_base.adapters` on concepts of the sample corpus.

All ways of making pictures are judged by the same drawings. The references of the way with the most references are
ignored for all ways, so that copying a reference is not rewarded and ways with more references are not penalised.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from imagerag.base.model import BaseModel
from imagerag.embedded.judge import contrastive_features
from imagerag.embedded.sample import Drawing
from imagerag.evaluation.efficientnet import load_feature_network, to_thumbnails
from imagerag.evaluation.intervals import Estimate, estimate
from imagerag.evaluation.recognition import Floats, Judge
from imagerag.recipes.tiny_base.data import Pictures
from imagerag.recipes.tiny_base.vae import to_input
from imagerag.training.config import ReferenceChoice
from imagerag.training.data import Ints, RagBatch, RagData

RIGHT, ONE = ReferenceChoice.found(4), ReferenceChoice.found(1)
RANDOM, NONE = (RIGHT.model_copy(update={share: 1.0}) for share in ("random", "none"))
_STYLES_OF_A_CONCEPT = 3
_BATCH_SIZE = 64
_COPY_QUANTILE = 0.999


@dataclass(frozen=True, kw_only=True)
class Row:
    """Metrics of one way of making pictures: means over concepts with 95 % confidence intervals."""

    title: str
    recognised: Estimate
    """Share of pictures whose concept is the nearest of 100, by the first judge."""
    recognised_second: Estimate
    """Share of pictures whose concept is the nearest of 100, by the second judge."""
    disagreement: float
    """Share of pictures that one judge recognises and the other does not."""
    identified: Estimate
    """Share of pictures whose nearest target latents have the same concept."""
    latent_error: Estimate
    """Mean squared error against the target drawing's latents (variance 1)."""
    sharpness: Estimate
    """Gradient energy of the latents relative to that of drawings."""
    nearest: Estimate | None
    """Similarity to the nearest reference as thumbnails, in the first judge's features."""
    copies: Estimate | None
    """Share of pictures whose `nearest` exceeds that of 999 of 1,000 pairs of different drawings."""
    by_seed: tuple[float, ...]
    """Share recognised by training seed."""
    by_concept: tuple[float, ...]
    """Share recognised by concept, for paired differences."""
    disputed: tuple[int, ...]
    """Pictures of the first seed that one judge recognises and the other does not."""


class Judges:
    """The two judges, fitted on the drawings of the sample corpus."""

    def __init__(self, drawings: Sequence[Drawing]) -> None:
        pictures = Pictures.of(drawings)
        self.concepts: Ints = pictures.concepts.numpy()
        """Concept of each drawing (N,)."""
        self.place_of = {drawing.image: place for place, drawing in enumerate(drawings)}
        self.number_of = dict(zip((d.concept.name for d in drawings), self.concepts.tolist(), strict=True))
        """Concept by name."""
        self.split_of = dict(zip(self.concepts.tolist(), (d.concept.split for d in drawings), strict=True))
        self._first = load_feature_network()
        real = [to_input(pictures.pixels, "cpu")]
        self._judges = [Judge.of(features, self.concepts) for features in self.features(real)]
        self._thumbnails = Judge.of(self.thumbnails(real), self.concepts)

    def features(self, pictures: Sequence[torch.Tensor]) -> list[Floats]:
        """Return each judge's features (N, D) of batches of pictures (B, 3, H, W), -1 to 1."""
        return [self._first(pictures), contrastive_features(pictures)]

    def thumbnails(self, pictures: Sequence[torch.Tensor]) -> Floats:
        """Return the first network's features (N, D) of thumbnails of batches of pictures (B, 3, H, W), -1 to 1."""
        return self._first(to_thumbnails(pictures))

    def recognised(self, features: list[Floats], concepts: Ints, candidates: Ints, left_out: Ints) -> list[Floats]:
        """Return each judge's verdicts, 1 or 0 for each picture (N,).

        Args:
            features: each judge's features of the pictures (N, D).
            concepts: true concepts of the pictures (N,).
            candidates: concepts from which the competitors are drawn.
            left_out: drawings to ignore for each picture (N, K), padded with -1.
        """
        return [
            judge.recognised(own, concepts, candidates, left_out).astype(float)
            for judge, own in zip(self._judges, features, strict=True)
        ]

    def nearest(self, thumbnails: Floats, shown: Ints) -> Floats:
        """Return the similarity (N,) of thumbnails to the nearest of the references `shown` (N, K)."""
        judge = self._thumbnails
        centred = thumbnails - judge.centre
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        similarities = np.einsum("nd,nkd->nk", unit, judge.features[shown])
        return np.asarray(np.where(shown >= 0, similarities, -1).max(1))

    def copy_threshold(self, concepts: Ints) -> float:
        """Return the 99.9 % quantile of similarities between different drawings of `concepts`."""
        features = self._thumbnails.features[np.isin(self.concepts, concepts)]
        similarities = (features @ features.T)[np.triu_indices(len(features), 1)]
        return float(np.quantile(similarities[similarities < 1 - 1e-4], _COPY_QUANTILE))


class Measurer:
    """Measures ways of making pictures on a fixed set of examples."""

    def __init__(self, data: RagData, judges: Judges, examples: Ints) -> None:
        """Initialise the measurer.

        Args:
            data: the training set.
            judges: the judges.
            examples: examples of `data` (N,), whose captions are concepts of the sample corpus.
        """
        self._data, self._judges, self.examples = data, judges, examples
        self.prompts = data.prompts(examples)
        self._concepts = np.array([judges.number_of[prompt] for prompt in self.prompts])
        self._candidates = np.unique(self._concepts)
        self._threshold = judges.copy_threshold(self._candidates)
        self._places = np.array([judges.place_of.get(image, -1) for image in data.images()] + [-1])
        """Drawing of each row of the index; -1 for none, also in the last position, which padding selects."""
        self._left_out = self.shown(RIGHT, 0)
        """Drawings to ignore for each example (N, 4), the same for all ways."""

    @classmethod
    def of_split(cls, data: RagData, judges: Judges, split: str, per_concept: int = _STYLES_OF_A_CONCEPT) -> "Measurer":
        """Return a measurer of `per_concept` examples for each concept of a split, in different styles."""
        rows = np.concatenate([data.learnt, data.held_out])
        concepts = np.array([judges.number_of.get(prompt, -1) for prompt in data.prompts(rows)])
        own = np.array([judges.split_of.get(concept) == split for concept in concepts.tolist()])
        order = np.random.default_rng(0).permutation(np.flatnonzero(own))
        chosen = [order[concepts[order] == concept][:per_concept] for concept in np.unique(concepts[own])]
        return cls(data, judges, np.sort(rows[np.concatenate(chosen)]))

    def batches(self, choice: ReferenceChoice, seed: int) -> Iterator[RagBatch]:
        """Yield batches of the examples with references; all ways use the same noise for a seed."""
        for number, part in enumerate(self._parts()):
            batch = self._data.read(part, choice, np.random.default_rng([seed, number]))
            noise = np.random.default_rng([seed, number, 1]).standard_normal(tuple(batch.latents.shape), np.float32)
            yield replace(batch, noise=torch.from_numpy(noise))

    def shown(self, choice: ReferenceChoice, seed: int) -> Ints:
        """Return the references of the examples as numbers of drawings (N, K), padded with -1."""
        rows = [
            self._data.choose(part, choice, np.random.default_rng([seed, number]))
            for number, part in enumerate(self._parts())
        ]
        places: Ints = self._places[np.concatenate(rows)]
        return places

    def own(self) -> Ints:
        """Return the target drawings of the examples (N, 1)."""
        places: Ints = self._places[self._data.own(self.examples)][:, None]
        return places

    def measure(
        self, title: str, made: Sequence[torch.Tensor], base: BaseModel, shown: Sequence[Ints] | None = None
    ) -> Row:
        """Measure the pictures of one way.

        Args:
            title: title of the way.
            made: generated latents (N, C, H, W) for each seed.
            base: the base model, whose autoencoder decodes them.
            shown: references for each seed, as numbers of drawings (N, K), padded with -1; None without references.
        """
        real = torch.cat([batch.latents for batch in self.batches(NONE, 0)])
        per_seed = []
        for seed, latents in enumerate(made):
            pictures = [pixels(base, part) for part in latents.split(_BATCH_SIZE)]
            features = self._judges.features(pictures)
            verdicts = self._judges.recognised(features, self._concepts, self._candidates, self._left_out)
            errors = (latents - real).square().mean((1, 2, 3)).numpy()
            energies = (_energy(latents) / _energy(real).mean()).numpy()
            near = np.full(len(real), np.nan)
            if shown is not None:
                near = self._judges.nearest(self._judges.thumbnails(pictures), shown[seed])
            copies = np.where(np.isnan(near), np.nan, near > self._threshold)
            per_seed.append(np.stack([*verdicts, self._identified(latents, real), errors, energies, near, copies]))
        values = np.mean(per_seed, axis=0)
        first, *rest = (self._by_concept(each) for each in values)
        names = ("recognised_second", "identified", "latent_error", "sharpness", "nearest", "copies")
        disputed = [each[0] != each[1] for each in per_seed]
        return Row(
            title=title,
            recognised=estimate(first),
            **{name: None if np.isnan(own).any() else estimate(own) for name, own in zip(names, rest, strict=True)},  # type: ignore[arg-type]
            disagreement=float(np.mean(disputed)),
            by_seed=tuple(float(each[0].mean()) for each in per_seed),
            by_concept=tuple(first.tolist()),
            disputed=tuple(np.flatnonzero(disputed[0]).tolist()),
        )

    def _parts(self) -> list[Ints]:
        return np.array_split(self.examples, -(-len(self.examples) // _BATCH_SIZE))

    def _by_concept(self, values: Floats) -> Floats:
        return np.array([values[self._concepts == concept].mean() for concept in self._candidates])

    def _identified(self, latents: torch.Tensor, real: torch.Tensor) -> Floats:
        distances = torch.cdist(latents.flatten(1), real.flatten(1)).numpy()
        return np.asarray(self._concepts[distances.argmin(1)] == self._concepts, float)


def pixels(base: BaseModel, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (N, C, h, w) to pictures (N, 3, H, W), -1 to 1."""
    with torch.inference_mode():
        decoded: torch.Tensor = base.vae.decode(latents / base.vae.config.scaling_factor).sample.clamp(-1, 1)
    return decoded


def _energy(latents: torch.Tensor) -> torch.Tensor:
    across, down = latents.diff(dim=3).square().mean((1, 2, 3)), latents.diff(dim=2).square().mean((1, 2, 3))
    return across + down
