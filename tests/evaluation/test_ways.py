"""How many references each way has, of an index that is smaller than the default."""

from pathlib import Path

import pytest

from imagerag.artifacts import Deployed, Finetuned, IndexVersion
from imagerag.errors import UserError
from imagerag.evaluation.config import EvaluateConfig
from imagerag.evaluation.ways import ways_of
from imagerag.retrieval.store import Store
from tests.retrieval.rows import ENCODER, append, make_rows


def index_of(folder: Path, num_rows: int) -> IndexVersion:
    store = Store(str(folder), "few")
    store.open_or_create(ENCODER)
    return store.index_version(append(store, make_rows(0, num_rows)))


@pytest.fixture
def finetuned(tmp_path: Path) -> Finetuned:
    return Finetuned(
        uri=str(tmp_path), name="a", base="tiny", base_digest="", index_name="few", index_version=1, run_id="",
        num_steps=1, score=1.0, best_step=1, best_score=1.0, is_new=True,
    )  # fmt: skip


def test_a_default_is_no_more_than_an_index_has_rows(tmp_path: Path, finetuned: Finetuned) -> None:
    three, five = index_of(tmp_path / "three", 3), index_of(tmp_path / "five", 5)
    config = EvaluateConfig(ways=("base", "slerp", "best_slerp", "adapter", "random", "champion"))
    ways = ways_of(config, finetuned, "tiny", three, Deployed(folder=str(tmp_path), index=five))
    numbers = {way.name: way.num_references for way in ways if way.is_column}
    assert numbers == {"base": 0, "slerp": 1, "adapter": 3, "random": 3, "champion": 4}
    columns = {way.curve: way.setting for way in ways if way.is_column}
    points = [(way.curve, way.setting) for way in ways if not way.is_column]
    settings = {"slerp": config.slerp_ws, "adapter": config.adapter_scales}
    assert points == [(curve, each) for curve, own in settings.items() for each in own if each != columns[curve]]
    assert len(points) < sum(map(len, settings.values())), "a setting that is a column's is no point beside it"


def test_a_request_for_more_is_refused(tmp_path: Path, finetuned: Finetuned) -> None:
    index = index_of(tmp_path / "three", 3)
    with pytest.raises(UserError, match="num_references can't be more than the index has rows: 4 of 3 in 'few'"):
        ways_of(EvaluateConfig(num_references=4), finetuned, "tiny", index, None)
