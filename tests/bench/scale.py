"""What drivers do for a table that is as it should be, at ten times the rows: time and memory of each step."""

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from imagerag.embedding.survey import survey, with_ids
from imagerag.retrieval import feature_column
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, check_rows, publish, status
from imagerag.retrieval.schema import EncoderIdentity, FeatureIdentity, row_schema
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import reachable_rows
from tests.bench.harness import Row, Scale, in_fresh_process, median

NUM_ROWS: dict[Scale, tuple[int, int]] = {"small": (10_000, 100_000), "full": (100_000, 1_000_000)}
BAR = 3.0
MEMORY_BAR = 2.0
REPETITIONS = 3
DIM = 16

_ENCODER = EncoderIdentity(id="synthetic", digest="0" * 64, dim=DIM)
_FEATURES = FeatureIdentity(base="synthetic", digest="0" * 64, fit="auto", shape=(16, 4, 4))
_CHUNK_ROWS = 50_000


def run(scale: Scale, folder: Path) -> list[Row]:
    """Measure on the smaller and the larger table, each in a process of its own."""
    sizes = NUM_ROWS[scale]
    for num_rows in sizes:
        in_fresh_process(_make, str(folder), num_rows)
    few, many = (in_fresh_process(_measure, str(folder), num_rows)[0] for num_rows in sizes)
    peer = f"{sizes[0]:,} rows"
    # What has to read all rows takes ten times as long for ten times as many.
    bars = {"index status": BAR, "rows without features": BAR, "a takedown's look-up": BAR}
    rows = [
        Row(
            what=f"{sizes[1]:,} rows: {step}",
            unit="s",
            ours=many[step],
            peer=few[step],
            peer_name=peer,
            at_most=bars.get(step),
        )
        for step in _STEPS
    ]
    memory = Row(
        what=f"{sizes[1]:,} rows: memory of all these",
        unit="GiB",
        ours=many["memory"],
        peer=few["memory"],
        peer_name=peer,
        at_most=MEMORY_BAR,
    )
    return [*rows, memory]


def _images(num_rows: int) -> Iterator[pa.Table]:
    """What the corpus has: the very rows of the table."""
    for start in range(0, num_rows, _CHUNK_ROWS):
        numbers = np.arange(start, min(start + _CHUNK_ROWS, num_rows))
        yield pa.table(
            {
                "url": [f"https://images.example/{number}.jpg" for number in numbers],
                "caption": [f"picture number {number}" for number in numbers],
                "source": [f"host{number % 100}.example" for number in numbers],
                "licence": pa.repeat("CC0-1.0", len(numbers)),
                "sha256": [f"{number:064x}" for number in numbers],
                "width": pa.array(np.full(len(numbers), 64, np.int32)),
                "height": pa.array(np.full(len(numbers), 64, np.int32)),
                "shard": pa.array(numbers // 10_000),
                "row": pa.array(numbers),
            }
        )


def _make(folder: str, num_rows: int) -> None:
    store = Store(folder, f"rows-{num_rows}")
    store.create(_ENCODER)
    schema, random = row_schema(_ENCODER), np.random.default_rng(0)
    fragments: list[str] = []
    for images in _images(num_rows):
        vectors = random.standard_normal((len(images), DIM), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        embeds = pa.FixedSizeListArray.from_arrays(vectors.ravel(), DIM)
        rows = with_ids(images)
        rows = rows.append_column("image", pa.repeat(pa.scalar(b"an image", pa.large_binary()), len(images)))
        rows = rows.append_column("text_embed", embeds).append_column("image_embed", embeds)
        fragments += store.write_fragments(rows.select(schema.names))
    store.commit(fragments, store.version)
    assert publish(store, build_index(store, IndexConfig()), PublishConfig(min_recall=0.5)).published
    version = feature_column.prepare(store, _FEATURES)
    missing = feature_column.missing(store.dataset(version), _FEATURES)
    zeros = np.zeros((max(missing.values()), *_FEATURES.shape), np.float16)
    filled = [
        feature_column.fill(store, _FEATURES, version, fragment, lambda images, _: zeros[: len(images)], len(zeros))
        for fragment in missing
    ]
    feature_column.commit(store, filled, version)
    assert publish(store, build_index(store, IndexConfig()), PublishConfig(min_recall=0.5)).published


def _measure(folder: str, num_rows: int) -> dict[str, float]:
    store, before = Store(folder, f"rows-{num_rows}"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = {
        step: median([_timed(measure, store, num_rows) for _ in range(REPETITIONS)]) for step, measure in _STEPS.items()
    }
    return seconds | {"memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20}


def _timed(measure: Callable[[Store, int], None], store: Store, num_rows: int) -> float:
    started = time.perf_counter()
    measure(store, num_rows)
    return time.perf_counter() - started


def _compare(store: Store, num_rows: int) -> None:
    assert survey(_images(num_rows), store).num_missing == 0


def _check(store: Store, num_rows: int) -> None:
    assert all(check.passed for check in check_rows(store, store.dataset(), 0.5))


def _status(store: Store, num_rows: int) -> None:
    assert status(store).num_rows == num_rows


def _lacking(store: Store, num_rows: int) -> None:
    assert feature_column.count_lacking(store.dataset(), _FEATURES) == 0


def _look_up(store: Store, num_rows: int) -> None:
    assert reachable_rows(store, {"url": ["https://images.example/7.jpg"]}).num_rows == 1


_STEPS: dict[str, Callable[[Store, int], None]] = {
    "ingest's comparison with nothing to do": _compare,
    "publish's checks of rows": _check,
    "index status": _status,
    "rows without features": _lacking,
    "a takedown's look-up": _look_up,
}
