"""How an estimate is written."""

import pytest

from imagerag.evaluation.intervals import Estimate


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
