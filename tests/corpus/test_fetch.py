import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagerag.corpus import stores
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.download import BYTES_PER_PIXEL
from imagerag.corpus.fetch import GuardedDownloader, UprightResizer, fetch_shard
from imagerag.corpus.guard import ByteBudget
from imagerag.corpus.hosts import Hosts
from imagerag.corpus.shards import PLAN_SCHEMA
from imagerag.corpus.source import read_images
from tests.corpus.fetched import planned
from tests.corpus.photos import encoded, scene
from tests.corpus.web import Web, picture
from tests.corpus.whole import attempts_of

_PEAK = """
import io, resource, sys
from PIL import Image
from imagerag.corpus.photos import decode, open_image

def peak_of(side):
    file = io.BytesIO()
    Image.new("RGBA", (side, side), (200, 30, 40, 128)).save(file, "PNG", compress_level=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decode(open_image(file, ["png"], side**2), file, 512)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

peak_of(600)  # what it loads once
print(peak_of(2000) / 2000**2)
"""


def test_a_picture_with_transparency_needs_no_more_memory_than_a_worker_is_given() -> None:
    # The picture itself was in memory before, 4 bytes a pixel.
    ran = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert float(ran.stdout) + 4 <= BYTES_PER_PIXEL


def test_all_threads_together_hold_no_more_than_the_budget() -> None:
    budget, held, most = ByteBudget(10), [0], [0]

    def hold(number: int) -> float:
        size = 1 + number % 10
        waited = budget.take(size)
        held[0] += size
        most[0] = max(most[0], held[0])
        time.sleep(0.001)
        held[0] -= size
        budget.give_back(size)
        return waited

    with ThreadPool(8) as pool:
        waits = pool.map(hold, range(100))
    assert most[0] <= 10
    assert max(waits) > 0


def test_a_shard_of_files_larger_than_the_budget_is_fetched_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = encoded(scene(), "PNG")
    monkeypatch.setattr("imagerag.corpus.config.IN_FLIGHT_BYTES", len(file))
    with Web() as web:
        rows = [{"url": web.serve(f"/{number}", file), "caption": "c", "source": "s"} for number in range(12)]
        rows.append({"url": web.serve("/gone", b"", 404), "caption": "c", "source": "s"})
        config = DownloadConfig(max_bytes=len(file), thread_count=8, allowed_hosts=(web.host,))
        downloader = GuardedDownloader(str(tmp_path), config, UprightResizer(config), Hosts(config))
        downloader.download_shard((0, pa.Table.from_pylist(rows, PLAN_SCHEMA)))
    assert attempts_of(Corpus(str(tmp_path)))["status"].to_pylist().count("success") == 12


def test_a_shard_reads_each_row_of_a_parquet_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(number, (8, 8)) for number in range(1000)]
    table = pa.table({"image": images, "caption": [f"picture {number}" for number in range(1000)]})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=500)
    rows = planned(read_images(str(tmp_path / "images.parquet")).rows.table())
    decoded = []
    image_bytes = stores.image_bytes

    def counting(column: pa.Array) -> pa.Array:
        decoded.append(len(column))
        return image_bytes(column)

    monkeypatch.setattr(stores, "image_bytes", counting)
    corpus = Corpus(str(tmp_path / "shards"))
    fetch_shard(corpus.shard(0), rows, DownloadConfig(thread_count=64))
    assert attempts_of(corpus)["status"].to_pylist() == ["success"] * 1000
    assert sum(decoded) == 1000


def test_a_worker_does_not_load_torch_which_others_still_can() -> None:
    script = (
        "import sys, imagerag.corpus.fetch; assert 'torch' not in sys.modules; from torch.utils.data import Dataset"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
