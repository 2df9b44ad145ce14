"""How far generated pictures are from real ones as a whole: Fréchet and kernel distance of their features."""

from dataclasses import dataclass

import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
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
    statistics = [fid_features_to_statistics(each) for each in (one, other)]
    frechet = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    kernel = kid_features_to_metric(
        one, other, kid_subsets=_SUBSETS, kid_subset_size=_SUBSET_SIZE, verbose=False, rng_seed=0
    )
    mean, deviation = (kernel[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    return Distances(frechet=frechet, kernel=1000 * mean, kernel_deviation=1000 * deviation)
