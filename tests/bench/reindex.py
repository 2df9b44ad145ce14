"""Time to follow a list of which one percent changed, beside ingesting it as a whole."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.download import download
from imagerag.corpus.url_list import read_url_list
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.embed import embed
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, publish
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from tests.bench.corpus import HOST, serving, write_drawings, write_url_list
from tests.bench.harness import Row, Scale, in_fresh_process

BAR = 0.03
NUM_URLS: dict[Scale, int] = {"small": 600, "full": 100_000}


@dataclass(frozen=True)
class Stages:
    """Seconds of each stage, by its name, and what changed in the table."""

    seconds: dict[str, float]
    num_added: int
    num_removed: int


def run(scale: Scale, folder: Path) -> list[Row]:
    """Ingest a list, change it, and re-index."""
    num_urls = NUM_URLS[scale]
    num_each = num_urls // 300  # a third of one percent is new, a third has a new caption, a third is gone
    files = write_drawings(folder / "drawings")
    first, changed = folder / "first.parquet", folder / "changed.parquet"
    with serving(folder / "drawings") as base_url:
        write_url_list(first, base_url, files, range(num_urls))
        write_url_list(changed, base_url, files, range(num_each, num_urls + num_each))
        _recaption(changed, num_each)
        full, full_s = in_fresh_process(_ingest, first, folder / "home", "add")
        again, again_s = in_fresh_process(_ingest, changed, folder / "home", "replace")
    assert (full.num_added, again.num_added, again.num_removed) == (num_urls, 2 * num_each, 2 * num_each)

    def row(what: str, ours: float, peer: float, bar: float | None = None) -> Row:
        peer_name = f"full ingest of {num_urls:,} URLs"
        return Row(what=what, unit="s", ours=ours, peer=peer, peer_name=peer_name, at_most=bar)

    return [
        row("re-index after 1 % of the list changed, whole process", again_s, full_s, BAR),
        *(row(f"of this: {stage}", again.seconds[stage], full.seconds[stage]) for stage in full.seconds),
    ]


def _recaption(url_list: Path, count: int) -> None:
    """Change the captions of the first `count` rows of a list."""
    table = pq.read_table(url_list)
    captions = table["caption"].to_pylist()
    captions[:count] = [f"{caption}, drawn anew" for caption in captions[:count]]
    pq.write_table(table.set_column(1, "caption", pa.array(captions)), url_list)


def _ingest(url_list: Path, home: Path, mode: Literal["add", "replace"]) -> Stages:
    settings, seconds = Settings(home=home), {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - started

    config = DownloadConfig(allowed_hosts=(HOST,), image_format="webp")
    store = Store(settings.index_uri, "bench")
    corpus = Corpus(settings.shards_of("bench"))
    with stage("download"):
        download(read_url_list(str(url_list)), corpus=corpus, config=config, settings=settings, mode=mode)
    with stage("embed"):
        embedded = embed(corpus=corpus, store=store, encoder="tiny", config=EmbedConfig(), settings=settings)
    with stage("index"):
        index = build_index(store, IndexConfig())
    with stage("publish"):
        publication = publish(store, index, PublishConfig())
    assert publication.published, publication.checks
    return Stages(seconds, embedded.num_added, embedded.num_removed)
