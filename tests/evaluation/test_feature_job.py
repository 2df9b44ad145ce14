"""Features of pictures: those of the networks, computed once for each picture."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from imagerag.errors import UserError
from imagerag.evaluation import feature_job
from imagerag.evaluation.config import EvaluateConfig, MetricFiles
from imagerag.evaluation.feature_job import FeatureJob, Source
from imagerag.evaluation.networks import load_network
from imagerag.hspace.encode import open_images
from imagerag.settings import Settings
from imagerag.storage.hexadecimal import ID
from imagerag.storage.keyed_table import KeyedTable
from tests.evaluation.networks import CLIP_DIM, write_clip
from tests.generation.with_index import drawing

NUM = 10
PROMPTS = [f"drawing {number}" for number in range(NUM)]
IDS = pa.array([bytes([number]) * ID.byte_width for number in range(NUM)], ID)

pytestmark = pytest.mark.usefixtures("jobs_here")


@pytest.fixture
def table(tmp_path: Path) -> KeyedTable:
    """Pictures in another order than they are wanted in."""
    table = KeyedTable.of(str(tmp_path), "pictures", {"number": 1}, [pa.field("image", pa.large_binary())])
    order = np.random.default_rng(0).permutation(NUM)
    images = [drawing(number) for number in order.tolist()]
    table.append(pa.table({"id": IDS.take(pa.array(order)), "image": images}, schema=table.schema))
    return table


def job_of(table: KeyedTable, num_rows: int = NUM, files: MetricFiles | None = None) -> FeatureJob:
    rows = pa.table({"id": IDS, "prompt": PROMPTS}).slice(0, num_rows)
    config = EvaluateConfig(files=files or MetricFiles())
    nothing = Source(table=KeyedTable(table.uri, "index", table.schema), rows=rows.slice(0, 0))
    return FeatureJob({"adapter": Source(table=table, rows=rows), "nothing": nothing}, config, table.uri)


def totals(job: FeatureJob, home: Path) -> list[int]:
    """Run the job, and return the totals that it reports."""
    seen: list[int] = []
    job.run(Settings(home=home), lambda done, total, note="": seen.append(total))
    return seen


def test_features_are_those_of_the_networks_in_the_order_of_the_pictures(table: KeyedTable, tmp_path: Path) -> None:
    files = MetricFiles(clip=str(write_clip(tmp_path / "clip")))
    job = job_of(table, files=files)
    assert set(totals(job, tmp_path)) == {4 * NUM}
    images = open_images([drawing(number) for number in range(NUM)])
    for network, dim in (("efficientnet", 1280), ("thumbnails", 1280), ("drawings", 160), ("clip", CLIP_DIM)):
        features = job.read("adapter", network)  # type: ignore[arg-type]
        assert features.shape == (NUM, dim)
        expected = load_network(network, files)(images, PROMPTS)  # type: ignore[arg-type]
        np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
        assert np.abs(features - np.roll(expected, 1, axis=0)).max() > 1e-3, "another order would be another result"
        assert len(job.read("nothing", network)) == 0  # type: ignore[arg-type]


def test_what_is_there_is_not_computed_again(
    table: KeyedTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_job, "_ROWS_OF_A_TASK", 2)

    class KilledError(Exception):
        pass

    def kill(done: int, total: int, note: str = "") -> None:
        if done == 4:
            raise KilledError

    with pytest.raises(KilledError):
        job_of(table, 6).run(Settings(home=tmp_path), kill)
    assert set(totals(job_of(table, 6), tmp_path)) == {3 * 6 - 4}, "two parts were committed"
    assert set(totals(job_of(table), tmp_path)) == {3 * 4}, "further pictures"
    assert totals(job_of(table), tmp_path) == []
    clip = MetricFiles(clip=str(write_clip(tmp_path / "clip")))
    assert set(totals(job_of(table, files=clip), tmp_path)) == {NUM}, "another network"
    assert len(list(tmp_path.glob("features-*.lance"))) == 2 * 4, "one for each source and network"


def test_features_that_no_metric_reads_are_not_computed(table: KeyedTable, tmp_path: Path) -> None:
    rows = pa.table({"id": IDS, "prompt": PROMPTS})
    source = Source(table=table, rows=rows, unused=("drawings",))
    assert set(totals(FeatureJob({"index": source}, EvaluateConfig(), table.uri), tmp_path)) == {2 * NUM}
    assert len(list(tmp_path.glob("features-*.lance"))) == 2


def test_a_network_without_its_file_is_named(table: KeyedTable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"files.inception must be a file or folder on this machine; .*gone does not"):
        job_of(table, files=MetricFiles(inception=str(tmp_path / "gone")))
