"""Means and other statistics with 95 % confidence intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_PARTS = 20
_FEW = 50
"""Number of values below which bootstrap intervals of a mean are too narrow: with ten, they cover 0.90, not 0.95."""


@dataclass(frozen=True)
class Estimate:
    """A mean, or another statistic, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        """Format with the precision that the interval justifies: two digits of its half-width, at most 5 decimals."""
        half = (self.high - self.low) / 2
        digits = min(5, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 3
        return f"{self.mean:,.{digits}f} [{self.low:,.{digits}f}, {self.high:,.{digits}f}]"


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of at least two independent `values` (N,) with its interval.

    It is a bootstrap interval, or with less than 50 values that of Student's t.
    """
    data = np.asarray(values, float)
    mean = float(data.mean())
    if np.ptp(data) == 0:
        return Estimate(mean, mean, mean, len(data))
    from scipy.stats import bootstrap, t  # takes a second to import

    if len(data) < _FEW:
        half = float(t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / len(data) ** 0.5)
        return Estimate(mean, mean - half, mean + half, len(data))
    interval = bootstrap((data,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(data))


def jackknifed(statistic: Callable[[np.ndarray], float], values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Return a statistic of `values` (N, ...) with its interval by the grouped jackknife, with at most 20 parts.

    A bootstrap would not do for distances between distributions: values that are drawn twice increase them.

    Args:
        statistic: maps values (M, ...) to a number.
        values: one per picture.
        groups: group of each value (N,), at least two groups. Dependent values share a group and are left out together.
    """
    from scipy.stats import t

    members = np.unique(groups, return_inverse=True)[1]
    num_parts = min(_PARTS, members.max() + 1)
    parts = np.random.default_rng(0).permutation(members.max() + 1)[members] % num_parts
    without = np.array([statistic(values[parts != part]) for part in range(num_parts)])
    error = np.sqrt((num_parts - 1) / num_parts * np.square(without - without.mean()).sum())
    value, half = statistic(values), float(t.ppf(0.975, num_parts - 1) * error)
    return Estimate(value, value - half, value + half, len(values))
