"""What drivers do where little or nothing changed, at ten times the rows: time, growth and peak memory of each step.

`BENCH_SCALE_ROWS=100000,10000000` measures other numbers of rows than `--scale` names. In `BENCH_SCALE_FOLDER`, the
tables that a run made are kept if it is interrupted.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from imagerag import takedown
from imagerag.base.model import load_base
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.download import download
from imagerag.corpus.ledger import iter_images
from imagerag.corpus.plan import plan
from imagerag.embedding import encoder_files
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.embed import embed
from imagerag.embedding.survey import survey
from imagerag.retrieval import feature_column
from imagerag.retrieval.checks import check_rows
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import publish, status
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import reachable_rows
from imagerag.training.config import tiny
from imagerag.training.data import RagData
from imagerag.training.places import find_places
from imagerag.training.plan import plan as plan_training
from tests.bench.harness import Row, Scale, in_fresh_process, median
from tests.bench.synthetic import NAME, PUBLISH, SHARD_ROWS, World

ROWS = "BENCH_SCALE_ROWS"
FOLDER = "BENCH_SCALE_FOLDER"
NUM_ROWS: dict[Scale, tuple[int, int]] = {"small": (10_000, 100_000), "full": (100_000, 1_000_000)}
BAR = 3.0
"""Of what should not depend on the number of rows."""
UPDATE_BAR_S = 60.0
MEMORY_BAR_GIB = 2.0
"""Of tables of up to `MOST_VECTORS` rows; twice as much for larger ones."""
MOST_VECTORS = 10_000_000
"""Larger tables are measured without vector indexes and features, which would not fit on a small disk."""
_LEAST_GIB = 0.05
"""Growth of less memory is not stated: it is that of libraries which are loaded."""
NUM_NEW = 1_000
REPETITIONS = 3


@dataclass(frozen=True)
class Step:
    """A step of a driver."""

    run: Callable[[World], Callable[[], None]]
    """Open what the step needs, which is not measured; return the step."""
    at_most: float | None = None
    """The bar on the time of many rows, as a multiple of that of few."""
    needs_vectors: bool = False
    """Whether it can be measured only where the table has vector indexes and features."""
    changes: bool = False
    """Whether the step changes the table. Such a step is measured once, as those that read all rows are."""


@dataclass(frozen=True)
class Cost:
    """Of a step."""

    seconds: float
    gib: float
    """Peak memory of the process, beyond what it had before the step."""


def run(scale: Scale, folder: Path) -> list[Row]:
    """Measure each step on the smaller and the larger table, each in a process of its own."""
    folder = Path(os.environ.get(FOLDER, folder))
    folder.mkdir(parents=True, exist_ok=True)
    few, many = (int(number) for number in os.environ[ROWS].split(",")) if ROWS in os.environ else NUM_ROWS[scale]
    has_vectors = many <= MOST_VECTORS
    worlds = [World(folder, num_rows, has_vectors) for num_rows in (few, many)]
    for world in worlds:
        in_fresh_process(_make, world)
    rows = []
    limit_gib = MEMORY_BAR_GIB if has_vectors else 2 * MEMORY_BAR_GIB
    for name, step in STEPS.items():
        if step.needs_vectors and not has_vectors:
            continue
        less, more = (in_fresh_process(_measure, world, name)[0] for world in worlds)
        what = f"{many:,} rows: {name}"
        peer_name = f"{few:,} rows; the time grows with {_power(less.seconds, more.seconds, many / few)}"
        rows.append(
            Row(what=what, unit="s", ours=more.seconds, peer=less.seconds, peer_name=peer_name, at_most=step.at_most)
        )
        limit = "limit"
        if min(less.gib, more.gib) >= _LEAST_GIB:
            limit += f"; the memory grows with {_power(less.gib, more.gib, many / few)}"
        rows.append(
            Row(what=f"{what}, memory", unit="GiB", ours=more.gib, peer=limit_gib, peer_name=limit, at_most=1.0)
        )
        if name == UPDATE:
            rows.append(Row(what=what, unit="s", ours=more.seconds, peer=UPDATE_BAR_S, peer_name="limit", at_most=1.0))
    return rows


def _power(less: float, more: float, factor: float) -> str:
    """Return the power of the number of rows that a cost grows with, if there are `factor` times as many."""
    return f"rows^{math.log(more / less) / math.log(factor):.2f}"


def _make(world: World) -> None:
    world.make()


def _measure(world: World, name: str) -> Cost:
    step = STEPS[name]
    measured = step.run(world)
    before = _reset_peak_gib()
    is_short = step.at_most is not None and not step.changes
    seconds = [_timed(measured) for _ in range(REPETITIONS if is_short else 1)]
    return Cost(median(seconds), _peak_gib() - before)


def _reset_peak_gib() -> float:
    """Let `_peak_gib` count from now on: opening what a step needs may have taken more. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_gib()


def _peak_gib() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


def _timed(measured: Callable[[], None]) -> float:
    started = time.perf_counter()
    measured()
    return time.perf_counter() - started


def _read_list(world: World) -> Callable[[], None]:
    def measured() -> None:
        assert world.url_list.rows.num_rows == world.num_rows

    return measured


def _plan_download(world: World) -> Callable[[], None]:
    def measured() -> None:
        assert not plan(world.corpus, SHARD_ROWS, retry_failed=False).num_rows

    return measured


def _download(world: World) -> Callable[[], None]:
    rows = world.url_list

    def measured() -> None:
        done = download(rows, corpus=world.corpus, config=DownloadConfig(), settings=world.settings, mode="replace")
        assert (done.num_success, done.num_fetched) == (world.num_rows, 0)

    measured()  # which is what the step before measures, and what it finds is kept
    return measured


def _embed(world: World) -> Callable[[], None]:
    def measured() -> None:
        done = embed(
            corpus=world.corpus,
            store=world.store,
            encoder=world.encoder,
            config=EmbedConfig(),
            settings=world.settings,
        )
        assert (done.num_rows, done.num_added, done.num_removed) == (world.num_rows, 0, 0)

    measured()
    return measured


def _compare(world: World) -> Callable[[], None]:
    def measured() -> None:
        found = survey(iter_images(world.corpus), world.store)
        assert (found.num_missing, len(found.stale)) == (0, 0)

    return measured


def _compare_new(world: World) -> Callable[[], None]:
    empty = Store(str(world.settings.home / "empty"), NAME)
    empty.open_or_create(encoder_files.resolve(world.encoder).identity)

    def measured() -> None:
        found = survey(iter_images(world.corpus), empty)
        assert sum(shard.num_rows for shard in found.shards()) == world.num_rows

    return measured


def _check(world: World) -> Callable[[], None]:
    def measured() -> None:
        assert all(check.passed for check in check_rows(world.store, world.store.dataset()))

    return measured


def _publish(world: World) -> Callable[[], None]:
    return world.publish


def _status(world: World) -> Callable[[], None]:
    def measured() -> None:  # which is also what `doctor` asks of an index
        assert status(world.store).num_rows == world.num_rows

    return measured


def _features(world: World) -> Callable[[], None]:
    identity = world.features

    def measured() -> None:
        version = feature_column.prepare(world.store, identity)
        assert not feature_column.missing(world.store.dataset(version), identity)

    return measured


def _plan_training(world: World) -> Callable[[], None]:
    config = tiny().training
    plan_training(world.examples, config)  # imports, and the models' sizes

    def measured() -> None:
        assert plan_training(world.examples, config).num_rows < world.num_rows

    return measured


def _find_places(world: World) -> Callable[[], None]:
    training_set = world.training_set

    def measured() -> None:
        places = find_places(training_set)
        assert len(places.learnt) + len(places.held_out) == world.num_rows

    return measured


def _open_training(world: World) -> Callable[[], None]:
    base, training_set = load_base(world.base), world.training_set
    places = find_places(training_set)

    def measured() -> None:
        RagData(training_set, base, places)

    return measured


def _find(world: World) -> Callable[[], None]:
    def measured() -> None:
        assert reachable_rows(world.store, {"url": [_URL]}).num_rows == 1

    return measured


def _take_down(world: World) -> Callable[[], None]:
    def measured() -> None:
        done = takedown.take_down(world.settings, NAME, takedown.find(world.settings, NAME, urls=[_URL]))
        assert done.removal is not None
        assert (done.num_samples, done.removal.num_rows) == (1, 1)

    return measured


def _update(world: World) -> Callable[[], None]:
    """New rows replace as many old ones, after the comparison and the embedding."""
    new = pa.concat_tables(world.rows(world.num_rows, world.num_rows + NUM_NEW))
    places = np.random.default_rng(0).choice(world.num_rows, NUM_NEW, replace=False)
    old = world.store.dataset().take(np.sort(places), columns=["id"])["id"]

    def measured() -> None:
        store = world.store
        assert store.delete(old) == NUM_NEW
        store.commit(store.write_fragments(new), store.version)
        world.fill()
        assert publish(store, build_index(store, IndexConfig()), PUBLISH).published

    return measured


_URL = "https://images.example/7.jpg"
UPDATE = f"re-index of {NUM_NEW:,} rows, without the download and the models"
STEPS = {
    "reading a list": Step(_read_list),
    "what to download, after a change": Step(_plan_download),
    "what to embed, after a change": Step(_compare),
    "what to embed in a new table": Step(_compare_new),
    "ingest with nothing to do: download": Step(_download, BAR),
    "ingest with nothing to do: embed": Step(_embed, BAR),
    "index and publish with nothing to do": Step(_publish, BAR),
    "publish's checks of rows": Step(_check),
    "`index status`, and `doctor` of an index": Step(_status, BAR),
    "features with nothing to do": Step(_features, BAR, needs_vectors=True),
    "plan of a training": Step(_plan_training, needs_vectors=True),
    "finding a training's examples, once for all workers": Step(_find_places),
    "opening a training set in a worker": Step(_open_training, needs_vectors=True),
    "rows of a URL in all versions": Step(_find, BAR),
    UPDATE: Step(_update, changes=True),
    "takedown of one image": Step(_take_down, BAR, changes=True),
}
"""In this order: the last ones change the table."""
