"""Peak memory of embedding many images, beside that of a tenth of them."""

import threading
from pathlib import Path

import psutil

from imagerag.corpus.config import DownloadConfig
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.job import embed
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from tests.bench.corpus import HOST, make_shards, serving, write_drawings, write_url_list
from tests.bench.harness import Row, Scale, in_fresh_process

BAR = 1.15
NUM_IMAGES: dict[Scale, tuple[int, int]] = {"small": (200, 1_000), "full": (5_000, 50_000)}
_INTERVAL_S = 0.25


def run(scale: Scale, folder: Path) -> list[Row]:
    """Embed the smaller and the larger corpus."""
    few, many = NUM_IMAGES[scale]
    files = write_drawings(folder / "drawings")
    url_lists = [folder / "few.parquet", folder / "many.parquet"]
    config = DownloadConfig(allowed_hosts=(HOST,), image_format="webp")
    with serving(folder / "drawings") as base_url:
        for url_list, count in zip(url_lists, (few, many), strict=True):
            write_url_list(url_list, base_url, files, range(count))
        uris, _ = in_fresh_process(make_shards, url_lists, folder / "home", config)
    few_gib, many_gib = (_peak_gib(uri, folder / uri.rpartition("/")[2]) for uri in uris)
    return [
        Row(
            what=f"peak memory of embedding {many:,} images with `tiny`, all processes",
            unit="GiB",
            ours=many_gib,
            peer=few_gib,
            peer_name=f"{few:,} images",
            at_most=BAR,
        )
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


def _embed(shards_uri: str, home: Path) -> None:
    settings = Settings(home=home)
    store = Store(settings.index_uri, "bench")
    embed(shards_uri=shards_uri, store=store, encoder="tiny", config=EmbedConfig(), settings=settings)
