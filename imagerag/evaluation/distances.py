"""How far generated pictures are from real ones as a whole: Fréchet and kernel distance of their features."""

from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from imagerag.evaluation.features import Features

_SUBSETS = 100
_SUBSET_SIZE = 100


@dataclass(frozen=True)
class Distances:
    """Of two sets of pictures; smaller is nearer."""

    frechet: float
    """Depends on the number of pictures: compare only sets of one size (arXiv 1706.08500)."""
    kernel: float
    """Unbiased; times 1,000 (arXiv 1801.01401)."""
    kernel_deviation: float
    """Over random subsets."""


def measure_distances(generated: Features, real: Features) -> Distances:
    """Compare features (N, D) and (M, D), each of at least 100 pictures."""
    one, other = (torch.from_numpy(each).double() for each in (generated, real))
    kernel = kid_features_to_metric(
        one, other, kid_subsets=_SUBSETS, kid_subset_size=_SUBSET_SIZE, verbose=False, rng_seed=0
    )
    mean, deviation = (kernel[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    return Distances(frechet=frechet(generated, real), kernel=1000 * mean, kernel_deviation=1000 * deviation)


def frechet(one: Features, other: Features) -> float:
    """Return the Fréchet distance of the normal distributions that fit features (N, D) and (M, D).

    What torch-fidelity computes, by another way: where covariances are `A^T A` and `B^T B`, the trace of the root of
    their product is the sum of the singular values of `A B^T`. For some hundred pictures that takes milliseconds, where
    the root of a matrix (D, D) takes seconds, and `jackknifed` asks for it twenty times.
    """
    means: list[np.ndarray] = []
    roots: list[np.ndarray] = []
    for each in (one.astype(np.float64), other.astype(np.float64)):
        means.append(each.mean(0))
        root = (each - means[-1]) / np.sqrt(len(each) - 1)
        roots.append(np.asarray(np.linalg.qr(root, mode="r")) if len(root) > root.shape[1] else root)
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + sum(np.square(root).sum() for root in roots) - 2 * shared)
