"""How an estimate is written, and how often its interval covers the true mean."""

import numpy as np
import pytest

from imagerag.evaluation.intervals import Estimate, estimate


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ((782.032, 753.6, 810.5), "782 [754, 810]"),
        ((12345.6, 11000.0, 13500.0), "12,346 [11,000, 13,500]"),
        ((0.190476, 0.047619, 0.380952), "0.19 [0.05, 0.38]"),
        ((0.383456, 0.305123, 0.461789), "0.383 [0.305, 0.462]"),
        ((0.00012, 0.00011, 0.00013), "0.00012 [0.00011, 0.00013]"),
        ((0.5, 0.5, 0.5), "0.500 [0.500, 0.500]"),
    ],
)
def test_it_has_the_digits_that_its_interval_justifies(values: tuple[float, float, float], written: str) -> None:
    mean, low, high = values
    assert str(Estimate(mean, low, high, num=10)) == written


@pytest.mark.parametrize("num", [3, 10, 49, 60])
def test_intervals_cover_the_true_mean_as_often_as_they_say(num: int) -> None:
    """Percentile bootstrap intervals, which are used from 50 values on, cover 0.90 with ten and 0.76 with three."""
    draws = np.random.default_rng(0).normal(size=(2000, num))
    found = [estimate(values) for values in draws]
    assert 0.925 < np.mean([each.low <= 0 <= each.high for each in found]) < 0.97
