"""Means with what is known of their error."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_PARTS = 20


@dataclass(frozen=True)
class Estimate:
    """A mean, or another figure of all values together, and its 95 % interval."""

    mean: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        """Write the digits that the interval justifies: two of half its width, at most five decimals."""
        half = (self.high - self.low) / 2
        digits = min(5, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 3
        return f"{self.mean:,.{digits}f} [{self.low:,.{digits}f}, {self.high:,.{digits}f}]"


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of independent `values`, which are at least two, with its bootstrap interval."""
    data = np.asarray(values, float)
    if np.ptp(data) == 0:
        return Estimate(float(data[0]), float(data[0]), float(data[0]), len(data))
    from scipy.stats import bootstrap  # takes a second, which flows that measure nothing need not pay

    interval = bootstrap((data,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return Estimate(float(data.mean()), float(interval.low), float(interval.high), len(data))


def jackknifed(statistic: Callable[[np.ndarray], float], values: np.ndarray, groups: npt.NDArray[np.int64]) -> Estimate:
    """Return a statistic of all `values` (N, ...) together, with its interval by leaving out a twentieth at a time.

    A bootstrap would draw some values twice, and by that alone move two distributions apart.

    Args:
        groups: of each value (N,), of at least two. Values of one group depend on each other, and stay together.
    """
    from scipy.stats import t

    members = np.unique(groups, return_inverse=True)[1]
    num_parts = min(_PARTS, members.max() + 1)
    parts = np.random.default_rng(0).permutation(members.max() + 1)[members] % num_parts
    without = np.array([statistic(values[parts != part]) for part in range(num_parts)])
    error = np.sqrt((num_parts - 1) / num_parts * np.square(without - without.mean()).sum())
    value, half = statistic(values), float(t.ppf(0.975, num_parts - 1) * error)
    return Estimate(value, value - half, value + half, len(values))
