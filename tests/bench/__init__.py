"""Benchmarks: what the main jobs cost beside what others build them from. `make bench` runs them all.

Each bench is a module of its name with a function `run`. Its rows go to `results/`, and the README's table is made from
there. Ours and the peer are always measured in one run on one machine, in turn; a figure is the median of its
repetitions.
"""

from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import imagerag  # noqa: F401 - before diffusers, which can't be imported without it where torch has no CUDA
from tests.bench.harness import Row, Scale

BENCHES = {
    "download": "images a second, beside plain img2dataset; and from a server that answers 429",
    "embed": "shards to committed rows at ViT-B/32 size, beside a bare open_clip loop on tensors",
    "features": "the cached-features job, beside a bare loop over the same encoder",
    "finetune": "training steps through Ray Train, beside the same steps in a bare loop",
    "generate": "one step with references beside one without; search with features beside one without",
    "gpu": "a fine-tuning step at SD 2.1's size on a GPU, beside bare matrix products",
    "memory": "peak memory of embedding a corpus, and of planning a list, beside one of a tenth of its size",
    "reindex": "time after 1 % of a list changed, beside a full ingest",
    "scale": "what drivers do where little or nothing changed, at ten times the rows",
    "serve": "a registered model: pull to first picture; pyfunc and HTTP beside the bare pipeline",
    "search": "latency, recall and build time at 1k and 100k rows, beside faiss-cpu",
}


class Bench(Protocol):
    """A module that measures one thing."""

    def run(self, scale: Scale, folder: Path) -> list[Row]:
        """Measure; nothing where the machine lacks what is measured.

        Args:
            scale: `full` is what the README shows, `small` takes a minute or two and shows only that the bench works.
            folder: Empty, for whatever the bench writes.
        """


def load_bench(name: str) -> Bench:
    """Import the bench called `name`."""
    assert name in BENCHES
    return cast(Bench, import_module(f"{__name__}.{name}"))
