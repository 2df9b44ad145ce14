"""Effect of new index rows without training: pictures from the same model and noise, before and after."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from imagerag.evaluation.compare import Cell, Comparison
from imagerag.evaluation.intervals import Estimate
from imagerag.evaluation.made import MadeHere, features_here
from imagerag.evaluation.metrics import NotMeasuredError, Pictures, Real, Recognised, mean_of, real_rows
from imagerag.evaluation.ways import Way
from imagerag.generation.batch import generate
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.encode import open_images
from imagerag.retrieval.search import Retriever
from imagerag.storage.hexadecimal import to_hex
from imagerag.storage.lance_table import rows_with


@dataclass(frozen=True)
class Growth:
    """Pictures of prompts before and after rows for them were added to the index."""

    comparisons: tuple[Comparison, ...]
    before: Estimate | None
    """Share of pictures recognised (`Recognised`) before; None with too few prompts."""
    after: Estimate | None
    """Share of pictures recognised after; None with too few prompts."""


def measure_growth(pipeline: ImageRAGTurboPipeline, uri: str, name: str, prompts: Sequence[str]) -> Growth:
    """Make pictures with the pipeline's index version, switch it to the published version, and make them again.

    Args:
        pipeline: keeps the published version afterwards.
        uri: URI of the index.
        name: table of the index.
        prompts: one picture is made per prompt and version.
    """
    before, seconds_before = _make(pipeline, "before", prompts)
    pipeline.use_index(uri, name)
    after, seconds_after = _make(pipeline, "after", prompts)
    assert pipeline.index is not None
    real = _real(pipeline.index.retriever, prompts)
    comparisons = tuple(
        Comparison(
            prompt=prompt,
            cells=tuple(
                Cell(
                    title=f"{made.way.title} the new rows",
                    image=made.image(number),
                    score=math.nan,
                    seconds=seconds / len(prompts),
                    references=made.references()[number],
                )
                for made, seconds in ((before, seconds_before), (after, seconds_after))
            ),
        )
        for number, prompt in enumerate(prompts)
    )
    numbers, both = np.arange(len(prompts)), (before, after)
    left_out = np.concatenate([real.places_of(made.references()) for made in both], 1)
    pictures = [Pictures(made, numbers, real, left_out) for made in both]
    try:
        judge = Recognised(real)
        shares = [mean_of(np.asarray(judge.measure(each))) for each in pictures]
    except NotMeasuredError:
        return Growth(comparisons, None, None)
    return Growth(comparisons, *shares)


def _real(retriever: Retriever, prompts: Sequence[str]) -> Real:
    rows = real_rows(retriever, prompts)
    images = rows_with(retriever.dataset, "id", rows["id"], ["id", "image"])
    ordered = images["image"].take(pc.index_in(rows["id"], value_set=images["id"]))
    return Real(to_hex(rows["id"]), rows["number"].to_numpy(), features_here(open_images(ordered.to_pylist())))


def _make(pipeline: ImageRAGTurboPipeline, title: str, prompts: Sequence[str]) -> tuple[MadeHere, float]:
    started = time.perf_counter()
    made = list(generate(pipeline, prompts, [0]))
    way = Way(name="adapter", title=title, base="", base_digest="")
    seconds = time.perf_counter() - started
    return MadeHere(way, [each.image for each in made], [each.references for each in made]), seconds
