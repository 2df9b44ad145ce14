"""The scale that an adapter is used with."""

import torch

from imagerag.training.scale import best_scale, identified


def found(**shares: float) -> dict[float, torch.Tensor]:
    """Of 100 examples, this share of the first ones is identified at each scale."""
    numbers = {float(name.removeprefix("at_").replace("_", ".")): share for name, share in shares.items()}
    return {scale: (torch.arange(100) < 100 * share).float() for scale, share in numbers.items()}


def test_the_best_scale_is_taken_and_of_equals_the_nearest_to_one() -> None:
    assert best_scale(found(at_1=0.5, at_1_5=0.8, at_2=0.6)) == 1.5
    assert best_scale(found(at_0_75=0.5, at_1=0.5, at_1_5=0.5)) == 1.0
    assert best_scale(found(at_1=0.5, at_1_5=0.8, at_2=0.8)) == 1.5
    assert best_scale(found(at_1=0.5, at_1_5=0.52, at_2=0.53)) == 1.0, "within the error"
    assert best_scale(found(at_0_75=0.9, at_1=0.5, at_1_5=0.4)) == 0.75


def test_identified_by_any_picture_of_the_same_prompt() -> None:
    real = torch.eye(3).view(3, 3, 1, 1)
    made = torch.stack([real[0], real[0], real[0]])
    assert identified(made, real, ["a", "b", "c"]).tolist() == [1, 0, 0]
    assert identified(made, real, ["a", "a", "c"]).tolist() == [1, 1, 0]
