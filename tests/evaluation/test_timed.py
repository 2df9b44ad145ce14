import torch
from PIL import Image

from imagerag.evaluation.timed import TimedPipeline
from tests.generation.with_index import make_pipeline


def test_it_tells_the_parts_of_a_call_apart_and_changes_nothing() -> None:
    plain, timed = make_pipeline(), TimedPipeline(make_pipeline())
    for arguments, parts in (
        ({}, {"denoising", "decoding"}),
        ({"reference_images": Image.new("RGB", (16, 16))}, {"retrieval", "denoising", "decoding"}),
    ):
        timed.seconds.clear()
        made = [
            each("a fox", generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images
            for each in (plain, timed)
        ]
        assert torch.equal(*made)
        assert {part for part, seconds in timed.seconds.items() if seconds > 0} == parts
