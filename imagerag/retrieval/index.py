"""Indexes of a table: vector indexes, chosen by size and with measured recall, and a full-text index of captions."""

import hashlib
import logging
import time
from math import isqrt
from typing import TYPE_CHECKING

from lance import LanceDataset
from pydantic import Field

from imagerag.artifacts import IndexBuild
from imagerag.config import Config
from imagerag.progress import OnProgress, silent
from imagerag.retrieval.ann import IndexRecord, read_record, write_record
from imagerag.retrieval.recall import fewest_probes, make_probes
from imagerag.retrieval.store import Store, compact

# LanceDB takes seconds to import, and every flow needs the configuration in this module.
if TYPE_CHECKING:
    from lancedb.table import Table

logger = logging.getLogger(__name__)

EXACT = "exact"
IVF_SQ = "IVF_SQ"
"""With 100,000 rows of 512 dimensions on two cores, it was built in 28 s and answered in 8 ms (p50, recall 0.98), while
IVF_HNSW_SQ took 181 s and 10 ms (recall 0.99), and exact search 320 ms."""
EXACT_BELOW = 5_000
"""Exact search took 10 ms for 5,000 rows of 384 dimensions and 23 ms for 10,000; IVF_SQ took 7 ms for both."""

_EMBEDDINGS = ("text_embed", "image_embed")
_NUM_QUERIES = 400
"""Number of queries for measuring recall. With 100, the measured recall was up to 0.02 higher than with 400."""
_MAX_GROWTH = 2
"""Growth factor of the table above which partitions are trained again; until then, they take in new rows."""
_NUM_STEPS = 4


_WORDS: dict[str, str | bool] = {"base_tokenizer": "icu/split", "remove_stop_words": False}
"""Settings of the full-text index. ICU, which Lance includes, splits captions into words by Unicode's rules and
dictionaries, also in scripts without spaces. Stop words are kept, so `the who` can be found; English is stemmed."""


class IndexConfig(Config):
    """How indexes are built."""

    exact_below: int = Field(
        default=EXACT_BELOW,
        ge=1_000,
        description="Tables with fewer rows are searched exactly, without a vector index.",
    )
    # At 0.98, one prompt in a hundred of the sample corpus lost the concept that exact search finds.
    target_recall: float = Field(
        default=0.99,
        ge=0.5,
        le=1.0,
        description="Recall@10 that a search must reach; it probes as few partitions of the index as that requires.",
    )


def build_index(
    store: Store, config: IndexConfig, on_progress: OnProgress = silent, *, from_scratch: bool = False
) -> IndexBuild:
    """Update the indexes of the newest version, measure their recall, and commit it with them.

    This does nothing if that version was already indexed with this config. New rows are added to an existing index.
    `from_scratch` rewrites everything, so that no file of the new version contains a deleted row.

    Raises:
        UserError: if there is no such table.
    """
    started = time.monotonic()
    with store.writer_lock():
        dataset = store.dataset()
        record = read_record(dataset)
        if record is None or (record.config, record.words) != (config.model_dump(), _WORDS):
            from_scratch, record = True, None
        if from_scratch or record is None or record.version != dataset.version:
            record = _build(store, config, record if not from_scratch else None, on_progress)
        else:
            on_progress(_NUM_STEPS, _NUM_STEPS, "unchanged")
    return IndexBuild(
        uri=store.uri,
        table=store.name,
        version=record.version,
        num_rows=record.num_rows,
        kind=record.kind,
        recall_at_10=record.recall_at_10,
        num_unindexed_rows=record.num_unindexed_rows,
        duration_s=time.monotonic() - started,
    )


def open_table(store: Store) -> "Table":
    """Open the table's newest version with LanceDB."""
    import lancedb

    return lancedb.connect(store.uri).open_table(store.name)


def _build(store: Store, config: IndexConfig, last: IndexRecord | None, on_progress: OnProgress) -> IndexRecord:
    """Update the indexes of the last build, or build them from scratch if `last` is None."""
    compact(store.dataset(), deleted_share=0.1 if last else 0.0)
    on_progress(1, _NUM_STEPS, "compacted")
    if last is None:
        _index_words(store)
    num_rows = store.count()
    kind = EXACT if num_rows < config.exact_below else IVF_SQ
    num_trained_rows = _index_vectors(store, kind, num_rows, last)
    if last is not None:
        # Merging with the one index that is there keeps it one: a search would look into every further one as well.
        store.dataset().optimize.optimize_indices(num_indices_to_merge=1)
    on_progress(3, _NUM_STEPS, f"indexed {num_rows} rows: {kind}")
    nprobes: dict[str, int] = {}
    recall = 1.0
    dataset = store.dataset()
    rows = _digest_of_rows(dataset)
    same_partitions = last is not None and (last.kind, last.num_trained_rows) == (kind, num_trained_rows)
    if last is not None and same_partitions and last.rows == rows:
        nprobes, recall = last.nprobes, last.recall_at_10
    elif kind != EXACT:
        probes = make_probes(dataset, _NUM_QUERIES)
        known = last.nprobes if last is not None and same_partitions else {}
        nprobes, recall = fewest_probes(dataset, probes, isqrt(num_trained_rows), config.target_recall, known)
    record = IndexRecord(
        version=dataset.version + 1,
        kind=kind,
        num_rows=num_rows,
        num_trained_rows=num_trained_rows,
        nprobes=nprobes,
        recall_at_10=recall,
        num_unindexed_rows=num_rows - min(index.num_rows_indexed for index in dataset.describe_indices()),
        rows=rows,
        config=config.model_dump(),
        words=_WORDS,
    )
    write_record(dataset, record)
    on_progress(_NUM_STEPS, _NUM_STEPS, f"recall@10 {recall:.3f}")
    return record


def _digest_of_rows(dataset: LanceDataset) -> str:
    """Return a digest of all that tells rows apart, but for their features."""
    digest = hashlib.sha256()
    for column in dataset.to_table(columns=["id", "url", "source", "licence"]).sort_by("id").columns:
        digest.update("\0".join(column.to_pylist()).encode())
    return digest.hexdigest()


def _index_words(store: Store) -> None:
    from lancedb.index import FTS

    open_table(store).create_index("caption", config=FTS(**_WORDS), replace=True)


def _index_vectors(store: Store, kind: str, num_rows: int, last: IndexRecord | None) -> int:
    """Create, keep or drop the vector indexes; return the number of rows that they were trained on."""
    if kind == EXACT:
        dataset = store.dataset()
        for index in dataset.describe_indices():
            if index.field_names[0] in _EMBEDDINGS:
                dataset.drop_index(index.name)
        return 0
    if last is not None and last.kind == kind and num_rows <= _MAX_GROWTH * last.num_trained_rows:
        return last.num_trained_rows
    from lancedb.index import IvfSq

    table = open_table(store)
    for column in _EMBEDDINGS:
        table.create_index(column, config=IvfSq(distance_type="cosine", num_partitions=isqrt(num_rows)), replace=True)
    return num_rows
