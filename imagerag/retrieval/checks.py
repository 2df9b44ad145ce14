"""Checks of the rows of a version before it is published."""

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from lance import LanceDataset, LanceFragment

from imagerag.artifacts import Check
from imagerag.retrieval.blocklist import count_blocked
from imagerag.retrieval.recall import to_numpy
from imagerag.retrieval.store import Store
from imagerag.storage.lance_table import batches_of, first_file
from imagerag.storage.spool import MEMORY_ROWS, Parts, by_id

_NORM_TOLERANCE = 1e-3


def check_rows(store: Store, dataset: LanceDataset, checked: LanceDataset | None = None) -> tuple[Check, ...]:
    """Check the rows of a version by themselves: there are some, and they are complete, distinct and allowed.

    Of the files that it shares with `checked`, a version that passed these checks, embeddings are not read again.
    """
    num_rows = int(dataset.count_rows())
    # Rows with the same id are in the same part.
    parts = Parts(batches_of(dataset, ["id"], MEMORY_ROWS), by_id)
    num_repeated = sum(len(part) - len(pc.unique(part["id"])) for part in parts)
    known = {first_file(fragment) for fragment in checked.get_fragments()} if checked else set()
    new = [fragment for fragment in dataset.get_fragments() if first_file(fragment) not in known]
    num_bad = _count_bad_embeddings(dataset, new) if new else 0  # none would mean all
    num_blocked = count_blocked(store, dataset)
    return (
        Check(name="rows", passed=num_rows > 0, detail=f"{num_rows} rows"),
        Check(name="unique ids", passed=num_repeated == 0, detail=f"{num_repeated} rows repeat another's id"),
        Check(name="embeddings", passed=num_bad == 0, detail=f"{num_bad} rows have an embedding whose norm is not 1"),
        Check(name="takedown", passed=num_blocked == 0, detail=f"{num_blocked} rows were taken down before"),
    )


def check_shrink(num_rows: int, num_before: int, max_shrink: float) -> Check:
    """Check that at most the share `max_shrink` of the rows is gone."""
    return Check(
        name="shrink",
        passed=num_rows >= (1 - max_shrink) * num_before,
        detail=f"{num_rows} rows after {num_before}; at most {max_shrink:.0%} may go",
    )


def _count_bad_embeddings(dataset: LanceDataset, fragments: Sequence[LanceFragment]) -> int:
    num_bad = 0
    scanner = dataset.scanner(columns=["text_embed", "image_embed"], fragments=fragments)
    for batch in scanner.to_batches():
        norms = np.stack([np.linalg.norm(to_numpy(column), axis=1) for column in batch.columns])
        # A NaN is not close to anything, so it counts as bad too.
        num_bad += int((~(np.abs(norms - 1) < _NORM_TOLERANCE)).any(axis=0).sum())
    return num_bad
