"""Comparisons as an HTML page, an image grid and JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from imagerag.evaluation.compare import Cell, Comparison
from imagerag.generation.sheet import sheet, to_png
from imagerag.retrieval.page import data_uri, render, web_link
from imagerag.retrieval.search import Retriever
from imagerag.storage.files import write_file

_MAX_ROWS_IN_SHEET = 64


def write_comparison(
    folder: Path,
    comparisons: Sequence[Comparison],
    retriever: Retriever,
    others: Mapping[str, Retriever] = MappingProxyType({}),
    *,
    title: str,
) -> None:
    """Write `index.html` (self-contained), `grid.png` and `scores.json` to `folder`.

    Args:
        folder: output folder.
        comparisons: one per prompt.
        retriever: the index that the references come from.
        others: indexes of the columns that use another one, by column title.
        title: title of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    html = render_comparisons("compare.html", comparisons, retriever, others, title=title)
    write_file(str(folder / "index.html"), html.encode())
    titles = " | ".join(cell.title for cell in comparisons[0].cells)
    rows = [
        (f"{each.prompt}  ({titles})" if number == 0 else each.prompt, [cell.image for cell in each.cells])
        for number, each in enumerate(comparisons[:_MAX_ROWS_IN_SHEET])
    ]
    sheet(rows).save(folder / "grid.png")
    scores = [{"prompt": each.prompt, "cells": [_numbers(cell) for cell in each.cells]} for each in comparisons]
    write_file(str(folder / "scores.json"), f"{json.dumps(scores, indent=1)}\n".encode())


def render_comparisons(
    template: str,
    comparisons: Sequence[Comparison],
    retriever: Retriever,
    others: Mapping[str, Retriever] = MappingProxyType({}),
    **values: object,
) -> str:
    """Render a template of this package with comparisons and embedded thumbnails of their references."""
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
