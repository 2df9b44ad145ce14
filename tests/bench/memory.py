"""Peak memory of embedding many images, and of planning the download of a long list, beside that of a tenth of it."""

import resource
import threading
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.plan import plan, want
from imagerag.corpus.url_list import read_url_list
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.embed import embed
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from tests.bench.corpus import HOST, make_shards, serving, write_drawings, write_url_list
from tests.bench.harness import Row, Scale, in_fresh_process

BAR = 1.15
LIST_BAR = 2.0  # of ten times as many rows; the shorter list hardly leaves memory
NUM_IMAGES: dict[Scale, tuple[int, int]] = {"small": (200, 1_000), "full": (5_000, 50_000)}
NUM_ROWS: dict[Scale, tuple[int, int]] = {"small": (10_000, 100_000), "full": (500_000, 5_000_000)}
_INTERVAL_S = 0.25
_LIST_BATCH = 10_000


def run(scale: Scale, folder: Path) -> list[Row]:
    """Embed the smaller and the larger corpus, and plan the shorter and the longer list."""
    few, many = NUM_IMAGES[scale]
    files = write_drawings(folder / "drawings")
    url_lists = [folder / "few.parquet", folder / "many.parquet"]
    config = DownloadConfig(allowed_hosts=(HOST,), image_format="webp")
    with serving(folder / "drawings") as base_url:
        for url_list, count in zip(url_lists, (few, many), strict=True):
            write_url_list(url_list, base_url, files, range(count))
        uris, _ = in_fresh_process(make_shards, url_lists, folder / "home", config)
    few_gib, many_gib = (_peak_gib(uri, folder / uri.rpartition("/")[2]) for uri in uris)
    few_rows, many_rows = NUM_ROWS[scale]
    few_planned_gib, many_planned_gib = (
        in_fresh_process(_plan, _list_of(folder / f"{count}.parquet", count), folder / f"planned-{count}")[0]
        for count in (few_rows, many_rows)
    )
    return [
        Row(
            what=f"peak memory of embedding {many:,} images with `tiny`, all processes",
            unit="GiB",
            ours=many_gib,
            peer=few_gib,
            peer_name=f"{few:,} images",
            at_most=BAR,
        ),
        Row(
            what=f"peak memory of reading and planning a list of {many_rows:,} URLs",
            unit="GiB",
            ours=many_planned_gib,
            peer=few_planned_gib,
            peer_name=f"{few_rows:,} URLs",
            at_most=LIST_BAR,
        ),
    ]


class PeakMemory:
    """Samples the memory of all processes below this one, shared pages counted once (Linux' proportional set size)."""

    gib = 0.0

    def __enter__(self) -> "PeakMemory":
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            self.gib = max(self.gib, sum(map(_memory, psutil.Process().children(recursive=True))) / 2**30)


def _peak_gib(shards_uri: str, home: Path) -> float:
    with PeakMemory() as peak:
        in_fresh_process(_embed, shards_uri, home)
    return peak.gib


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def _list_of(path: Path, count: int) -> Path:
    """A list without pictures behind it, of which every tenth row repeats an earlier one."""
    with pq.ParquetWriter(path, pa.schema([("url", pa.string()), ("caption", pa.string())])) as writer:
        for start in range(0, count, _LIST_BATCH):
            numbers = [number - 7 * (number % 10 == 9) for number in range(start, min(start + _LIST_BATCH, count))]
            urls = [f"https://cdn{number % 977}.images.example/photos/original-{number:012d}.jpg" for number in numbers]
            captions = [f"a photo of thing number {number} on a table, seen from above" for number in numbers]
            writer.write_table(pa.table({"url": urls, "caption": captions}))
    return path


def _plan(url_list: Path, shards: Path) -> float:
    corpus = Corpus(str(shards))
    want(corpus, read_url_list(str(url_list)).rows, "add")
    plan(corpus, 10_000, retry_failed=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _embed(shards_uri: str, home: Path) -> None:
    settings = Settings(home=home)
    store = Store(settings.index_uri, "bench")
    embed(corpus=Corpus(shards_uri), store=store, encoder="tiny", config=EmbedConfig(), settings=settings)
