"""The cached-features job with `tiny`, beside a bare loop that encodes the same rows and writes nothing."""

import time
from functools import partial
from pathlib import Path

from imagerag.base.model import load_base
from imagerag.embedded.sample import load_drawings
from imagerag.hspace.cache import cache_features
from imagerag.hspace.config import FeaturesConfig
from imagerag.hspace.encode import encode_references, open_images
from imagerag.retrieval.schema import EncoderIdentity
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from tests.bench.harness import Row, Scale, alternate, in_fresh_process, median
from tests.bench.memory import PeakMemory
from tests.retrieval.rows import append, make_rows

BAR = 0.9
BATCH_SIZE = 32
NUM_ROWS: dict[Scale, int] = {"small": 512, "full": 2_048}
NUM_FEW = 64
"""Rows that take little more than the start-up."""
REPETITIONS: dict[Scale, int] = {"small": 1, "full": 2}
MEMORY_BAR = 1.15
NUM_REMEMBERED: dict[Scale, tuple[int, int]] = {"small": (256, 1_024), "full": (2_048, 8_192)}
_ENCODER = EncoderIdentity(id="synthetic", digest="0" * 64, dim=16)


def run(scale: Scale, folder: Path) -> list[Row]:
    """Encode the same rows with either, in turn."""
    num_rows = NUM_ROWS[scale]
    number = iter(range(1_000))

    def ours(count: int) -> float:
        return in_fresh_process(_time_job, folder / str(next(number)), count)[0]

    few_s, ours_s, peer_s = alternate(
        REPETITIONS[scale],
        partial(ours, NUM_FEW),
        partial(ours, num_rows),
        lambda: in_fresh_process(_time_loop, num_rows)[0],
    )

    def peak_gib(count: int) -> float:
        with PeakMemory() as peak:
            ours(count)
        return peak.gib

    few, many = NUM_REMEMBERED[scale]
    row = partial(
        Row,
        unit="rows/s",
        peer=num_rows / median(peer_s),
        peer_name=f"loop over the same encoder, batches of {BATCH_SIZE}, model loaded, nothing written",
        at_least=BAR,
    )
    return [
        row(
            what=f"`tiny`, {num_rows:,} rows, without start-up (what they take longer than {NUM_FEW} rows)",
            ours=(num_rows - NUM_FEW) / (median(ours_s) - median(few_s)),
        ),
        row(
            what=f"`tiny`, {num_rows:,} rows, with the start of Ray and loading the model",
            ours=num_rows / median(ours_s),
        ),
        Row(
            what=f"peak memory of {many:,} rows, all processes",
            unit="GiB",
            ours=peak_gib(many),
            peer=peak_gib(few),
            peer_name=f"{few:,} rows",
            at_most=MEMORY_BAR,
        ),
    ]


def _time_job(folder: Path, num_rows: int) -> float:
    """Seconds from the call to the committed features."""
    store = Store(str(folder / "index"), "images")
    store.open_or_create(_ENCODER)
    for start in range(0, num_rows, 2_048):
        stop = min(start + 2_048, num_rows)
        images, captions = _drawings(start, stop)
        append(store, make_rows(start, stop, _ENCODER, image=images, caption=captions))
    started = time.perf_counter()
    cache_features(store, FeaturesConfig(batch_size=BATCH_SIZE), Settings(home=folder))
    return time.perf_counter() - started


def _time_loop(num_rows: int) -> float:
    """Seconds of encoding alone."""
    base = load_base("tiny")
    images, captions = _drawings(0, num_rows)
    started = time.perf_counter()
    for start in range(0, num_rows, BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        encode_references(base.vae, base.unet, base.conditioner, open_images(images[batch]), captions[batch], "auto")
    return time.perf_counter() - started


def _drawings(start: int, stop: int) -> tuple[list[bytes], list[str]]:
    """Images and captions; the corpus begins again where it ends, under other captions."""
    drawings = load_drawings()
    chosen = [(drawings[number % len(drawings)], number // len(drawings)) for number in range(start, stop)]
    return [drawing.image for drawing, _ in chosen], [f"{drawing.concept.name} {turn}" for drawing, turn in chosen]
