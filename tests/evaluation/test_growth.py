"""What new rows of an index change without training."""

import numpy as np
import pytest

from imagerag.base.model import load_base
from imagerag.evaluation.growth import measure_growth
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from tests.generation.with_index import drawing
from tests.training.conftest import NAME, World

NEW = "lighthouse"
KNOWN = "harp"


@pytest.fixture
def pipeline(own_world: World) -> ImageRAGTurboPipeline:
    """A pipeline with the published index."""
    pipeline = ImageRAGTurboPipeline.from_base(load_base(own_world.base, "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.use_index(own_world.settings.index_uri, NAME)
    return pipeline


def test_only_prompts_with_new_references_change(own_world: World, pipeline: ImageRAGTurboPipeline) -> None:
    before = pipeline.index
    assert before is not None
    own_world.add(100, [NEW], [drawing(100)])
    grown = measure_growth(pipeline, own_world.settings.index_uri, NAME, [NEW, KNOWN])
    assert pipeline.index is not None
    assert pipeline.index.retriever.version > before.retriever.version
    new, known = ([np.asarray(cell.image) for cell in each.cells] for each in grown.comparisons)
    assert [each.prompt for each in grown.comparisons] == [NEW, KNOWN]
    assert not np.array_equal(*new)
    assert np.array_equal(*known), "the same noise"
    titles, shown = zip(*((cell.title, cell.references) for cell in grown.comparisons[0].cells), strict=True)
    assert titles == ("before the new rows", "after the new rows")
    assert NEW not in [reference.caption for reference in shown[0]]
    assert shown[1][0].caption == NEW
    assert (grown.before, grown.after) == (None, None), "too few prompts to tell what is recognised"


def test_pictures_are_judged_by_images_that_were_no_references(
    own_world: World, pipeline: ImageRAGTurboPipeline
) -> None:
    """The pictures of the base's random weights are recognised as often as chance has it, one in twenty."""
    prompts = [f"number {number}" for number in range(20)]
    several = 3 * prompts
    own_world.add(100, several, [drawing(100 + number) for number in range(len(several))])
    grown = measure_growth(pipeline, own_world.settings.index_uri, NAME, prompts)
    assert grown.before is not None
    assert grown.after is not None
    assert grown.before.num == grown.after.num == 20
    assert grown.before.mean <= 0.3
    assert all(len(cell.references) == 1 for each in grown.comparisons for cell in each.cells)
