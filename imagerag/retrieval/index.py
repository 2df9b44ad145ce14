"""Indexes of a table: vector indexes, chosen by size and with measured recall, and a full-text index of captions."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isqrt

import numpy as np
import numpy.typing as npt
from lance import LanceDataset, LanceFragment

from imagerag.artifacts import IndexBuild
from imagerag.progress import OnProgress, duration, silent
from imagerag.retrieval.ann import IndexRecord, read_record, write_record
from imagerag.retrieval.config import IndexConfig, IndexRules
from imagerag.retrieval.feature_column import cached_features, count_lacking
from imagerag.retrieval.partitions import IVF_SQ, build_partitions, choose_device, longest_training_s, train_on
from imagerag.retrieval.recall import K, fewest_probes, make_probes, measure
from imagerag.retrieval.segments import column_may_hold_gone_rows, gone_fragments, update_segments
from imagerag.retrieval.store import Store
from imagerag.storage.lance_table import changed_fragments

logger = logging.getLogger(__name__)

# Otherwise the statistics of a vector index contain its centroids, and Lance warns of that on the terminal.
os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")

EXACT = "exact"
_EMBEDDINGS = ("text_embed", "image_embed")
_NUM_QUERIES = 400
"""Number of queries for measuring recall. With 100, the measured recall was up to 0.02 higher than with 400."""
_MAX_GROWTH = 2
"""Growth factor of the table above which partitions are trained again; until then, they take in new rows."""
_MAX_NEW_SHARE = 0.02
"""Share of rows that were added since recall was measured, above which it is measured again, for which all embeddings
are read. New rows join the partitions of their nearest centroids, as those before them did."""
_NUM_STEPS = 4


_FEW = 0.01
"""Share of the rows up to which a vector index has new ones in a second segment. Vector indexes have no more segments,
because a search probes as many partitions of each: with a million rows, it took 2.3 ms in one segment, and 4 ms in
four."""

_WORDS: dict[str, str | bool] = {"base_tokenizer": "icu/split", "remove_stop_words": False}
"""Settings of the full-text index. ICU, which Lance includes, splits captions into words by Unicode's rules and
dictionaries, also in scripts without spaces. Stop words are kept, so `the who` can be found; English is stemmed."""
_VALUES: dict[str, tuple[str, Mapping[str, str | bool]]] = {
    "caption": ("INVERTED", _WORDS),
    "id": ("BTREE", {}),
    "url": ("BTREE", {}),
    "image_sha256": ("BTREE", {}),
    "source": ("BITMAP", {}),
    "licence": ("BITMAP", {}),
}
"""Columns of words and of values by which rows are looked up, filtered and taken down, with the types and settings of
their indexes. In a million rows, a lookup by id took 12 ms with the index and 803 ms without."""


def build_index(
    store: Store, config: IndexConfig, on_progress: OnProgress = silent, *, rewrite: bool = False
) -> IndexBuild:
    """Update the indexes of the newest version, measure their recall, and commit it with them.

    This does nothing if that version was already indexed with this config, whose unset values are those of the last
    build. New rows are added to an existing index. `rewrite` is for takedowns, after fragments were rewritten: it also
    rewrites those files of indexes that contain values of fragments that were rewritten or are gone, and does so in an
    unfinished table too, because a takedown can't wait.

    Raises:
        UserError: if there is no such table, or an ingest of it did not end.
    """
    started = time.monotonic()
    with store.writer_lock():
        if not rewrite:
            store.require_finished()
        dataset = store.dataset()
        record = read_record(dataset)
        rules = config.rules(record.config if record else {})
        if record is not None and (record.config, record.words) != (asdict(rules), _WORDS):
            record = None
        # Records of early versions are for ten neighbours only.
        is_partial = record is not None and record.kind != EXACT and not record.recalls
        if rewrite or is_partial or record is None or record.version != dataset.version:
            record = _build(store, rules, record, on_progress, rewrite=rewrite)
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


def _build(
    store: Store, rules: IndexRules, last: IndexRecord | None, on_progress: OnProgress, *, rewrite: bool
) -> IndexRecord:
    """Update the indexes of the last build, or build them from scratch if `last` is None."""
    if not rewrite:
        store.compact(deleted_share=0.1 if last else 0.0)
    on_progress(1, _NUM_STEPS, "compacted")
    num_rows = store.count()
    kind = EXACT if num_rows < rules.exact_below else IVF_SQ
    num_trained_rows = _index_vectors(store, kind, num_rows, last, on_progress)
    num_new_rows, dropped = _add_new_vectors(store, last, rewrite=rewrite)
    segments = _index_values(store, kind, rewrite=last is None or rewrite)
    on_progress(3, _NUM_STEPS, f"indexed {num_rows} rows: {kind}")
    dataset = store.dataset()
    record = IndexRecord(
        version=dataset.version + 1,
        kind=kind,
        num_rows=num_rows,
        num_trained_rows=num_trained_rows,
        nprobes={},
        recall_at_10=1.0,
        num_new_rows=num_new_rows,
        num_unindexed_rows=_num_unindexed(dataset),
        rows=_digest_of_rows(dataset, last and store.find(last.version)),
        lacking={each.digest: count_lacking(dataset, each) for each in cached_features(dataset.schema)},
        config=asdict(rules),
        words=_WORDS,
        segments=segments,
        dropped=dropped,
    )
    if kind != EXACT:
        record = _measured(dataset, record, last, rules)
    write_record(dataset, record)
    on_progress(_NUM_STEPS, _NUM_STEPS, f"recall@10 {record.recall_at_10:.3f}")
    return record


def _measured(dataset: LanceDataset, record: IndexRecord, last: IndexRecord | None, rules: IndexRules) -> IndexRecord:
    """Return the record with measured `nprobes` and recalls.

    They are those of `last` if its partitions are still in use, and few rows are newer than its measurement.
    """
    known: Mapping[str, Mapping[str, int]] = {}
    if last is not None and (last.kind, last.num_trained_rows) == (record.kind, record.num_trained_rows):
        num_new_rows = last.num_new_rows + record.num_new_rows
        if last.recalls and num_new_rows <= _MAX_NEW_SHARE * record.num_rows:
            return replace(
                record,
                nprobes=last.nprobes,
                recall_at_10=last.recall_at_10,
                recalls=last.recalls,
                num_new_rows=num_new_rows,
            )
        known = last.nprobes
    probes = make_probes(dataset, _NUM_QUERIES)
    nprobes = fewest_probes(dataset, probes, isqrt(record.num_trained_rows), rules.target_recall, known)
    record = replace(record, nprobes=nprobes, num_new_rows=0)
    recalls = measure(dataset, probes, record)
    return replace(record, recalls=recalls, recall_at_10=recalls[f"recall@{K}"])


def _digest_of_rows(dataset: LanceDataset, before: LanceDataset | None) -> str:
    """Return a digest of everything that distinguishes rows, except their features, independently of their order.

    The digest is the sum of the rows' hashes, as four numbers of 64 bits. So that of an earlier version, if there is
    one with a record, becomes this one's by subtracting the rows of fragments that changed, and adding them as they are
    now.
    """
    record = None if before is None else read_record(before)  # an empty dataset is false
    if before is None or record is None or not record.rows:
        return _sum_of_hashes(dataset, dataset.get_fragments()).tobytes().hex()
    old, new = changed_fragments(before, dataset)
    total = np.frombuffer(bytes.fromhex(record.rows), "<u8")
    return (total - _sum_of_hashes(before, old) + _sum_of_hashes(dataset, new)).tobytes().hex()


def _sum_of_hashes(dataset: LanceDataset, fragments: Sequence[LanceFragment]) -> npt.NDArray[np.uint64]:
    total = np.zeros(4, "<u8")
    if fragments:  # none would mean all
        digest = "sha256(concat_ws(chr(0), encode(id, 'hex'), url, source, licence))"
        for batch in dataset.scanner(columns={"digest": digest}, fragments=fragments).to_batches():
            digests = np.frombuffer(b"".join(batch["digest"].to_pylist()), "<u8").reshape(-1, 4)
            total += digests.sum(axis=0, dtype=np.uint64)
    return total


def _index_values(store: Store, kind: str, *, rewrite: bool) -> dict[str, str]:
    """Update the indexes of words and, beside vector indexes, of values; see `update_segments`."""
    record = read_record(store.dataset())
    known, segments = record.segments if record else {}, dict[str, str]()
    for column, (lookup, settings) in _VALUES.items():
        if column == "caption" or kind != EXACT:
            segments |= update_segments(store, column, lookup, settings, known, rewrite=rewrite)
    return segments


def may_hold_gone_rows(dataset: LanceDataset) -> bool:
    """Return whether files of a version's indexes may contain rows of fragments that are gone.

    Rows that were deleted from other fragments are not meant: `fragments_with_deleted` finds them in these fragments'
    files, and rewriting a fragment drops them from the indexes.
    """
    record = read_record(dataset)
    known, dropped = (record.segments, record.dropped) if record else ({}, {})
    for index in dataset.describe_indices():
        (column,) = index.field_names
        if column in _EMBEDDINGS and not gone_fragments(dataset, index.name) <= {*dropped.get(index.name, ())}:
            return True
        if column in _VALUES and column_may_hold_gone_rows(dataset, column, *_VALUES[column], known):
            return True
    return False


def _add_new_vectors(store: Store, last: IndexRecord | None, *, rewrite: bool) -> tuple[int, dict[str, list[int]]]:
    """Add new rows to the vector indexes, and return their number and `IndexRecord.dropped`.

    An index is in one segment, or also in a small second one with the rows that were added since. Adding a few rows
    rewrites only the second one, and every search reads both. `rewrite` merges segments that contain rows of fragments
    that are gone; rewriting a fragment drops those that were deleted from it.
    """
    few, num_new_rows, dropped = store.count() * _FEW, 0, dict[str, list[int]]()
    for index in store.dataset().describe_indices():
        if index.field_names[0] not in _EMBEDDINGS:
            continue
        dataset = store.dataset()
        statistics = dataset.stats.index_stats(index.name)
        num_new, segments = int(statistics["num_unindexed_rows"]), statistics["num_indexed_rows_per_delta"]
        num_new_rows = max(num_new_rows, num_new)
        gone = gone_fragments(dataset, index.name)
        known = gone.intersection(last.dropped.get(index.name, ()) if last else ())
        has_gone = rewrite and known < gone
        is_small = sum(segments) - max(segments) + num_new <= few
        num_merged = len(segments) - (is_small and not has_gone)
        if num_new or has_gone:
            dataset.optimize.optimize_indices(num_indices_to_merge=num_merged, index_names=[index.name])
            if num_merged == len(segments):
                known = gone
        dropped[index.name] = sorted(known)
    return num_new_rows, dropped


def _num_unindexed(dataset: LanceDataset) -> int:
    """Return the number of rows that an index lacks, of the index that lacks most."""
    names = [index.name for index in dataset.describe_indices()]
    return max(int(dataset.stats.index_stats(name)["num_unindexed_rows"]) for name in names)


def _index_vectors(store: Store, kind: str, num_rows: int, last: IndexRecord | None, on_progress: OnProgress) -> int:
    """Create, keep or drop the vector indexes; return the number of rows that they were trained on."""
    if kind == EXACT:
        dataset = store.dataset()
        for index in dataset.describe_indices():
            if index.field_names[0] != "caption":
                dataset.drop_index(index.name)
        return 0
    if last is not None and last.kind == kind and num_rows <= _MAX_GROWTH * last.num_trained_rows:
        return last.num_trained_rows
    num_partitions, device = isqrt(num_rows), choose_device(num_rows)
    on_cpu = device == "cpu"
    limit = f"at most {duration(longest_training_s(store.encoder.dim, num_partitions))}" if on_cpu else f"on {device}"
    for column in _EMBEDDINGS:
        on_progress(1, _NUM_STEPS, f"training {num_partitions} partitions of {column}, {limit}")
        dataset = store.dataset()
        centroids = None if on_cpu else train_on(device, dataset, column, num_partitions)
        build_partitions(dataset, column, num_partitions, centroids)
    return num_rows
