"""Fréchet and kernel distances between the features of generated and real pictures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from imagerag.evaluation.efficientnet import Features

_SUBSETS = 100
_SUBSET_SIZE = 100
_BLOCK_ROWS = 1024
_SIGMA = 10.0

Kernel = Callable[[Features, Features], np.ndarray]
"""Returns the kernel's values (N, M) of features (N, D) and (M, D)."""


@dataclass(frozen=True)
class Distances:
    """Distances between two sets of pictures; smaller is better."""

    frechet: float
    """Fréchet distance (arXiv 1706.08500). It is biased by the number of pictures: compare only sets of equal size."""
    kernel: float
    """Unbiased kernel distance, times 1,000 (arXiv 1801.01401)."""
    kernel_deviation: float
    """Standard deviation of the kernel distance over random subsets, times 1,000."""


def measure_distances(generated: Features, real: Features) -> Distances:
    """Return the distances between features (N, D) and (M, D), each of at least 100 pictures."""
    one, other = (torch.from_numpy(each).double() for each in (generated, real))
    kernel = kid_features_to_metric(
        one, other, kid_subsets=_SUBSETS, kid_subset_size=_SUBSET_SIZE, verbose=False, rng_seed=0
    )
    mean, deviation = (kernel[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    return Distances(frechet=frechet(generated, real), kernel=1000 * mean, kernel_deviation=1000 * deviation)


def mmd(one: Features, other: Features, kernel: Kernel, spread_of_other: float | None = None) -> float:
    """Return the unbiased squared maximum mean discrepancy between features (N, D) and (M, D), times 1,000.

    Args:
        one: features (N, D).
        other: features (M, D).
        kernel: for example `polynomial`, which makes it the kernel distance (arXiv 1801.01401) over all pairs, instead
            of over random subsets.
        spread_of_other: `spread(other, kernel)`, if it is known.
    """
    within = spread(one, kernel) + (spread(other, kernel) if spread_of_other is None else spread_of_other)
    between = sum(float(kernel(block, other).sum()) for block in _blocks(one)) / (len(one) * len(other))
    return 1000 * (within - 2 * between)


def spread(features: Features, kernel: Kernel) -> float:
    """Return the mean kernel value over pairs of different rows of features (N, D)."""
    total, first = 0.0, 0
    for block in _blocks(features):
        values = kernel(block, features)
        total += float(values.sum()) - float(np.trace(values, first))  # without the pairs of a row with itself
        first += len(block)
    return total / (len(features) * (len(features) - 1))


def polynomial(one: Features, other: Features) -> np.ndarray:
    """Return the kernel (x y / D + 1)^3 of all pairs of features (N, D) and (M, D)."""
    values: np.ndarray = (one.astype(np.float64) @ other.T.astype(np.float64) / one.shape[1] + 1) ** 3
    return values


def gaussian(one: Features, other: Features) -> np.ndarray:
    """Return the Gaussian kernel with a sigma of 10, that of CMMD, of all pairs of features (N, D) and (M, D)."""
    distances = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
    values: np.ndarray = np.exp(-distances / (2 * _SIGMA**2))
    return values


def _blocks(features: Features) -> Iterator[Features]:
    """Yield the features in blocks, as the kernel's matrix of all pairs may not fit in memory."""
    for start in range(0, len(features), _BLOCK_ROWS):
        yield features[start : start + _BLOCK_ROWS]


def frechet(one: Features, other: Features) -> float:
    """Return the Fréchet distance between Gaussians fitted to features (N, D) and (M, D).

    The result equals torch-fidelity's. With covariances `A^T A` and `B^T B`, the trace of the square root of their
    product is the sum of the singular values of `A B^T`. For a few hundred pictures this takes milliseconds, a matrix
    square root (D, D) takes seconds, and `jackknifed` calls this function up to 21 times.
    """
    means: list[np.ndarray] = []
    roots: list[np.ndarray] = []
    for each in (one.astype(np.float64), other.astype(np.float64)):
        means.append(each.mean(0))
        root = (each - means[-1]) / np.sqrt(len(each) - 1)
        roots.append(np.asarray(np.linalg.qr(root, mode="r")) if len(root) > root.shape[1] else root)
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + sum(np.square(root).sum() for root in roots) - 2 * shared)
