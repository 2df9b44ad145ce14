"""Fréchet and kernel distances between the features of generated and real pictures."""

from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from imagerag.evaluation.efficientnet import Features

_SUBSETS = 100
_SUBSET_SIZE = 100
_BLOCK_ROWS = 1024


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


def kernel_distance(one: Features, other: Features, spread_of_other: float | None = None) -> float:
    """Return the unbiased kernel distance between features (N, D) and (M, D), times 1,000 (arXiv 1801.01401).

    It is the squared maximum mean discrepancy with a polynomial kernel of degree 3, over all pairs instead of over
    random subsets. `spread_of_other` is `spread(other)`, if it is known.
    """
    within = spread(one) + (spread(other) if spread_of_other is None else spread_of_other)
    return 1000 * (within - 2 * _kernel_sum(one, other) / (len(one) * len(other)))


def spread(features: Features) -> float:
    """Return the mean kernel value over pairs of different rows of features (N, D)."""
    rows = features.astype(np.float64)
    own = _kernel(np.square(rows).sum(1), rows.shape[1]).sum()
    return float((_kernel_sum(rows, rows) - own) / (len(rows) * (len(rows) - 1)))


def _kernel_sum(one: np.ndarray, other: np.ndarray) -> float:
    """Return the sum of the kernel over all pairs, computed in blocks, as the matrix of all pairs may not fit."""
    blocks = (one[start : start + _BLOCK_ROWS].astype(np.float64) for start in range(0, len(one), _BLOCK_ROWS))
    others = other.astype(np.float64)
    return sum(float(_kernel(block @ others.T, one.shape[1]).sum()) for block in blocks)


def _kernel(products: np.ndarray, dim: int) -> np.ndarray:
    """Return the kernel's values of the scalar products of features with `dim` values."""
    values: np.ndarray = (products / dim + 1) ** 3
    return values


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
