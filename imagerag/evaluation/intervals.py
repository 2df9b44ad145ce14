"""Means with what is known of their error."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of independent `values`, which are at least two."""
    data = np.asarray(values, float)
    if np.ptp(data) == 0:
        return Estimate(float(data[0]), float(data[0]), float(data[0]), len(data))
    from scipy.stats import bootstrap  # takes a second, which flows that measure nothing need not pay

    interval = bootstrap((data,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return Estimate(float(data.mean()), float(interval.low), float(interval.high), len(data))
