"""Pictures that a way made, as metrics and pages see them: by their features and references, and one at a time."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import numpy as np
from PIL import Image

from imagerag.evaluation.config import MetricFiles
from imagerag.evaluation.networks import NetworkName, load_network
from imagerag.evaluation.recognition import Floats
from imagerag.evaluation.ways import Way
from imagerag.generation.references import Reference

FeaturesBy = Callable[[NetworkName], Floats]
"""Returns the features (N, D) of pictures by a network."""


class Made(Protocol):
    """The pictures of one way in the order of the prompts, `images_per_prompt` of each."""

    @property
    def way(self) -> Way:
        """The way."""
        ...

    def __len__(self) -> int:
        """Return the number of pictures."""
        ...

    def references(self) -> Sequence[tuple[Reference, ...]]:
        """Return the references of each picture (N,)."""
        ...

    def features(self, network: NetworkName) -> Floats:
        """Return the features (N, D) of the pictures by a network."""
        ...

    def image(self, number: int) -> Image.Image:
        """Return a picture."""
        ...


class MadeHere:
    """A few pictures in memory."""

    def __init__(
        self,
        way: Way,
        images: Sequence[Image.Image],
        references: Sequence[tuple[Reference, ...]],
        files: MetricFiles | None = None,
    ) -> None:
        self.way, self._images, self._references = way, images, references
        self._features = features_here(images, files)

    def __len__(self) -> int:
        return len(self._images)

    def references(self) -> Sequence[tuple[Reference, ...]]:
        """Return the references of each picture (N,)."""
        return self._references

    def features(self, network: NetworkName) -> Floats:
        """Return the features (N, D) of the pictures by a network."""
        return self._features(network)

    def image(self, number: int) -> Image.Image:
        """Return a picture."""
        return self._images[number]


class ChosenMade:
    """Pictures chosen among several ways' pictures."""

    def __init__(self, way: Way, made: Sequence[Made], choice: Sequence[int]) -> None:
        """Initialise.

        Args:
            way: stands for the choice.
            made: the ways' pictures.
            choice: the number of the way of each picture (N,).
        """
        self.way, self._made, self._choice = way, made, np.asarray(choice)

    def __len__(self) -> int:
        return len(self._choice)

    def references(self) -> Sequence[tuple[Reference, ...]]:
        """Return the references of each picture (N,)."""
        all_references = [made.references() for made in self._made]
        return [all_references[way][number] for number, way in enumerate(self._choice)]

    def features(self, network: NetworkName) -> Floats:
        """Return the features (N, D) of the pictures by a network."""
        chosen: Floats | None = None
        for number in np.unique(self._choice).tolist():
            features = self._made[number].features(network)
            chosen = features.copy() if chosen is None else chosen
            chosen[self._choice == number] = features[self._choice == number]
        assert chosen is not None
        return chosen

    def image(self, number: int) -> Image.Image:
        """Return a picture."""
        return self._made[int(self._choice[number])].image(number)


def features_here(images: Sequence[Image.Image], files: MetricFiles | None = None) -> FeaturesBy:
    """Return the features of pictures in memory; each network looks at them once, in this process.

    Args:
        images: the pictures.
        files: files of networks, which are needed for networks that have any.
    """

    @cache
    def features(network: NetworkName) -> Floats:
        return load_network(network, files or MetricFiles())(images, [""] * len(images))

    return features
