"""Arguments of a call that have no effect warn, and only those."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imagerag.generation.pipeline import ImageRAGTurboPipeline
from tests.generation.with_index import latents


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negative_prompt": "blue"}, "guidance is off: negative_prompt has no effect"),
        ({"negative_prompt": "blue", "guidance_scale": 1.0}, "guidance is off: negative_prompt has no effect"),
        ({"guidance_rescale": 0.7}, "guidance is off: guidance_rescale has no effect"),
        (
            {"fusion": "none", "query": "a harp", "compose": True, "num_references": 2, "similarity_threshold": 0.5},
            "no references are used: num_references, query, compose, similarity_threshold has no effect",
        ),
        (
            {"fusion": "slerp", "reference_weights": 2.0},
            "slerp weighs references against each other: reference_weights has no effect",
        ),
        ({"fusion": "adapter", "w": 0.5}, "w is of fusion 'slerp'; with 'adapter' it has no effect"),
        (
            {"fusion": "none", "adapter_scale": 2.0},
            "adapter_scale is of fusion 'adapter'; with 'none' it has no effect",
        ),
        (
            {"reference_images": Image.new("RGB", (16, 16)), "compose": True},
            "references are given: compose has no effect",
        ),
        (
            {"reference_images": Image.new("RGB", (16, 16)), "num_references": 0},
            "references are given: num_references has no effect",
        ),
        ({"fusion": "none", "reference_weights": 2.0}, "no references are used: reference_weights has no effect"),
        (
            {"num_references": 0, "reference_masks": Image.new("L", (9, 9))},
            "no references are used: reference_masks has no effect",
        ),
    ],
)
def test_arguments_without_effect_warn(pipe: ImageRAGTurboPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as told:
        pipe("a castle", **arguments)
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    "arguments",
    [
        {"negative_prompt": "blue", "guidance_scale": 3.0, "guidance_rescale": 0.7},
        {"negative_prompt": "", "guidance_rescale": 0.0},
        {"fusion": "none", "num_references": 0, "compose": False},
        {"fusion": "slerp", "reference_weights": 0.0},
        {"fusion": "slerp", "num_references": 2, "reference_weights": [2.0, 1.0]},
        {"fusion": "adapter", "num_references": 1, "reference_weights": 2.0},
    ],
)
def test_arguments_with_an_effect_do_not_warn(pipe: ImageRAGTurboPipeline, arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no effect")
        pipe("a castle", **arguments)


def test_slerps_weights_have_no_effect_where_it_says_so(pipe: ImageRAGTurboPipeline) -> None:
    masks = [Image.radial_gradient("L"), Image.linear_gradient("L")]
    for arguments, weights in (
        ({"num_references": 1}, 3.0),
        ({"num_references": 2}, [3.0, 3.0]),
        ({"num_references": 2, "reference_masks": masks}, [3.0, 1.0]),
    ):
        expected = latents(pipe, fusion="slerp", **arguments)
        with pytest.warns(UserWarning, match="against each other: reference_weights has no effect"):
            made = latents(pipe, fusion="slerp", reference_weights=weights, **arguments)
        assert torch.allclose(made, expected, atol=1e-5), arguments


def test_a_negative_prompt_has_no_effect_on_a_model_whose_guidance_is_an_input(bases: dict[str, Path]) -> None:
    lcm = ImageRAGTurboPipeline.from_pretrained(bases["lcm"])
    expected = latents(lcm, guidance_scale=8.0)
    with pytest.warns(UserWarning, match="guidance is off: negative_prompt has no effect"):
        made = latents(lcm, guidance_scale=8.0, negative_prompt="blue")
    assert torch.equal(made, expected)
