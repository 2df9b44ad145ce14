import math

import pytest
import torch

from imagerag.hspace.slerp import slerp

TARGET, REFERENCE = torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def test_the_ends_are_target_and_reference() -> None:
    assert torch.equal(slerp(TARGET, REFERENCE, 1.0), TARGET)
    assert torch.allclose(slerp(TARGET, REFERENCE, 0.0), REFERENCE, atol=1e-6)


def test_it_goes_along_the_circle() -> None:
    one = torch.zeros(1, 2, 1, 1)
    other = one.clone()
    one[0, 0], other[0, 1] = 1.0, 1.0
    for w in (-1, -0.5, 0.2, 0.5, 0.8):
        fused = slerp(one, other, w).flatten()
        expected = [math.sin(w * math.pi / 2), math.cos(w * math.pi / 2)]
        assert fused.tolist() == pytest.approx(expected, abs=1e-6)


def test_every_sample_has_its_own_angle() -> None:
    batch = slerp(TARGET, REFERENCE, 0.8)
    for row in range(3):
        alone = slerp(TARGET[row : row + 1], REFERENCE[row : row + 1], 0.8)
        assert torch.allclose(batch[row], alone[0], atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 1 + 1e-6])
def test_parallel_and_opposite_are_safe(factor: float) -> None:
    assert torch.allclose(slerp(TARGET, factor * TARGET, 0.8), (0.8 + 0.2 * factor) * TARGET, atol=1e-3)


def test_nothing_is_safe() -> None:
    assert slerp(TARGET, torch.zeros_like(TARGET), 0.8).isfinite().all()


def test_half_precision_stays_half() -> None:
    fused = slerp(TARGET.half(), REFERENCE.half(), 0.8)
    assert fused.dtype == torch.float16
    assert torch.allclose(fused.float(), slerp(TARGET, REFERENCE, 0.8), atol=5e-3)


@pytest.mark.parametrize("w", [-1.1, 1.1, float("nan")])
def test_the_weight_is_checked(w: float) -> None:
    with pytest.raises(ValueError, match="between -1 and 1; got"):
        slerp(TARGET, REFERENCE, w)


def test_the_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 8, 4, 4\) and \(2, 8, 4, 4\)"):
        slerp(TARGET, REFERENCE[:2], 0.5)
