"""Comparisons as a page, a picture and numbers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from imagerag.evaluation.compare import Cell, Comparison
from imagerag.generation.sheet import sheet, to_png
from imagerag.retrieval.page import data_uri, render, web_link, write_whole
from imagerag.retrieval.search import Retriever

_MAX_ROWS_IN_SHEET = 64


def write_comparison(
    folder: Path,
    comparisons: Sequence[Comparison],
    retriever: Retriever,
    others: Mapping[str, Retriever] = MappingProxyType({}),
    *,
    title: str,
) -> None:
    """Write `index.html`, which needs nothing else, `grid.png` and `scores.json`.

    Args:
        folder: to write to.
        comparisons: of each prompt.
        retriever: of the index that references are of.
        others: of the columns, by title, that have another one.
        title: of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "index.html", render_comparisons("compare.html", comparisons, retriever, others, title=title))
    titles = " | ".join(cell.title for cell in comparisons[0].cells)
    rows = [
        (f"{each.prompt}  ({titles})" if number == 0 else each.prompt, [cell.image for cell in each.cells])
        for number, each in enumerate(comparisons[:_MAX_ROWS_IN_SHEET])
    ]
    sheet(rows).save(folder / "grid.png")
    scores = [{"prompt": each.prompt, "cells": [_numbers(cell) for cell in each.cells]} for each in comparisons]
    write_whole(folder / "scores.json", json.dumps(scores, indent=1) + "\n")


def render_comparisons(
    template: str,
    comparisons: Sequence[Comparison],
    retriever: Retriever,
    others: Mapping[str, Retriever] = MappingProxyType({}),
    **values: object,
) -> str:
    """Return the page that a template makes of comparisons, with the references' pictures in it."""
    used: dict[Retriever, set[str]] = {}
    for cell in (cell for each in comparisons for cell in each.cells):
        used.setdefault(others.get(cell.title, retriever), set()).update(row.id for row in cell.references)
    rows = (row for own, ids in used.items() if ids for row in own.fetch(sorted(ids), images=True))
    images = {row.id: row.image for row in rows}
    filters: dict[str, Callable[..., object]] = {
        "png": lambda cell: data_uri(to_png(cell.image)),
        "thumbnail": lambda id: data_uri(images[id] or b""),
        "web_link": web_link,
    }
    return render(
        "imagerag.evaluation", template, filters, comparisons=comparisons, version=retriever.version, **values
    )


def _numbers(cell: Cell) -> dict[str, object]:
    return {
        "title": cell.title,
        "score": cell.score,
        "seconds": cell.seconds,
        "note": cell.note,
        "references": [asdict(reference) for reference in cell.references],
    }
