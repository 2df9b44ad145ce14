"""The files of an evaluation: a self-contained HTML page, Markdown tables and an image grid."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from imagerag.evaluation.compare import Cell, Comparison
from imagerag.evaluation.compare_page import render_comparisons
from imagerag.evaluation.curve import Point, to_svg
from imagerag.evaluation.metrics import Pictures
from imagerag.evaluation.results import GRID, PAGE, TABLE, Results, WayResults
from imagerag.generation.references import Reference
from imagerag.generation.sheet import sheet, to_png
from imagerag.retrieval.search import Retriever

_SHOWN = 12
_DISPUTED = 4


def to_files(results: Results, pictures: Sequence[Pictures], retriever: Retriever) -> dict[str, bytes]:
    """Return the contents of the files by name."""
    chosen = _chosen(results)
    columns = [_column(results, way, own, chosen) for way, own in zip(results.ways, pictures, strict=True)]
    comparisons = [
        Comparison(prompt=results.prompts[number], cells=cells)
        for number, cells in zip(chosen, zip(*columns, strict=True), strict=True)
    ]
    html = render_comparisons(
        "evaluate.html",
        comparisons,
        retriever,
        _other_versions(results, pictures, retriever),
        title=f"imagerag evaluate: {results.base} with {retriever.name}",
        tables=[
            ("Means with 95 % intervals over prompts", list(results.rows())),
            ("Recognition and copies by slerp weight and adapter scale", list(results.point_rows())),
            ("Retrieval", list(results.retrieval_rows())),
            ("By category", list(results.slices())),
        ],
        notes=results.notes(),
        curves=_curves(results) if "recognised" in results.metrics else "",
    )
    titles = " | ".join(way.title for way in results.ways)
    rows: list[tuple[str, list[Image.Image]]] = [
        (f"{each.prompt}  ({titles})" if not number else each.prompt, [cell.image for cell in each.cells])
        for number, each in enumerate(comparisons)
    ]
    return {PAGE: html.encode(), TABLE: results.markdown().encode(), GRID: to_png(sheet(rows))}


def _chosen(results: Results) -> list[int]:
    """Return the prompts to show: successes and failures of the adapter, then prompts on which the judges disagree.

    Without recognition results, return the first prompts.
    """
    if "recognised" not in results.candidate.scores:
        return list(range(len(results.prompts)))[:_SHOWN]
    values = results.candidate.scores["recognised"].values
    good, bad = np.nonzero(values > 0)[0], np.nonzero(values == 0)[0]
    chosen = [*good[: _SHOWN // 2].tolist(), *bad[: _SHOWN - len(good[: _SHOWN // 2])].tolist()]
    if "recognised_second" in results.candidate.scores:
        disputed = np.setdiff1d(np.flatnonzero(results.candidate.disputed), chosen)
        chosen += disputed[:_DISPUTED].tolist()
    return chosen


def _other_versions(results: Results, pictures: Sequence[Pictures], retriever: Retriever) -> dict[str, Retriever]:
    """Return the index version of each way that has its own, such as the champion, by title.

    Its references may be rows that the evaluated version no longer has.
    """
    indexes = {way.title: own.made.way.index for way, own in zip(results.ways, pictures, strict=True)}
    return {
        title: Retriever(index.uri, index.name, version=index.version)
        for title, index in indexes.items()
        if index is not None and (index.uri, index.version) != (retriever.uri, retriever.version)
    }


def _curves(results: Results) -> str:
    """Return the curves of recognition against the share of copies as SVG."""
    curves: dict[str, list[Point]] = {}
    for point in results.points:
        if point.copies is not None:
            y = point.scores["recognised"].mean
            curves.setdefault(point.curve, []).append(Point(label=f"{point.setting}", x=point.copies.share, y=y))
    return to_svg(curves, x_title="share of copies", y_title="recognised") if curves else ""


def _column(results: Results, way: WayResults, own: Pictures, chosen: Sequence[int]) -> list[Cell]:
    """Return the first picture of each chosen prompt for one way."""
    references = own.made.references()
    return [_cell(results, way, own, number, references) for number in chosen]


def _cell(
    results: Results, way: WayResults, own: Pictures, number: int, references: Sequence[tuple[Reference, ...]]
) -> Cell:
    first = int(np.argmax(own.numbers == number))
    scored = {name: score.by_prompt[number] for name, score in way.scores.items() if score.by_prompt is not None}
    notes = [
        f"{results.metrics[name].title}: {'not measured' if value is None else f'{value:.2f}'}"
        for name, value in scored.items()
    ]
    if way.copies is not None and (label := way.copies.label(first)):
        notes.insert(0, label)
    assert way.latency is not None, way
    return Cell(
        title=way.title,
        image=own.made.image(first),
        score=math.nan,
        seconds=way.latency.total / 1000,
        references=references[first],
        note=", ".join(notes),
    )
