"""The ledger: the outcome of every URL, derived from the finished shards and stored nowhere else."""

from collections.abc import Collection, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from imagerag.corpus.corpus import Corpus
from imagerag.corpus.guard import Reason, reason_of
from imagerag.corpus.shards import ROW_DIGITS
from imagerag.storage.spool import Parts, aligned, by_url, numbered

SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("source", pa.string()),
        ("licence", pa.string()),
        ("status", pa.string()),  # "success" or "failed"
        ("reason", pa.string()),  # a `Reason`; null for successes
        ("error_message", pa.string()),
        ("sha256", pa.string()),  # SHA-256 of the file as fetched; null for failures
        ("expected_sha256", pa.string()),
        ("etag", pa.string()),  # response header; null for failures
        ("last_modified", pa.string()),  # response header; null for failures
        ("width", pa.int32()),  # size of the image as stored
        ("height", pa.int32()),
        ("shard", pa.int64()),
        ("key", pa.string()),  # key of the sample in its shard
    ]
)
_SHARDS_AT_ONCE = 128
PAIR = ["url", "caption"]
"""What identifies a row of a list."""
_IMAGE = ["url", "caption", "source", "licence", "sha256", "width", "height", "shard", "key"]


def iter_images(corpus: Corpus) -> Iterator[pa.Table]:
    """Yield the images that the corpus wants and has, in batches.

    The columns are url, caption, source, licence, sha256 (of the file as fetched), width and height (as stored), shard,
    key, and row, the image's position in the lists.
    """
    for rows, _ in read_parts(corpus):
        yield rows.filter(pc.equal(rows["status"], "success")).select([*_IMAGE, "row"])


def read_parts(corpus: Corpus) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield all wanted rows with their outcomes (see `standing`), and the ledger, in parts.

    The ledger is the latest attempt at every (url, caption) that was ever fetched. Its columns are those of `SCHEMA`,
    and `num_failures`, the number of failed attempts.

    Each part fits in memory, and all rows of a URL are in the same part. Rows within a part are in list order.
    """
    yield from ((rows, ledger) for rows, ledger, _ in read_parts_with(corpus, Parts((), by_url)))


def read_parts_with(corpus: Corpus, others: Parts) -> Iterator[tuple[pa.Table, pa.Table, pa.Table | None]]:
    """Yield the parts of `read_parts`, each with the rows of `others`, grouped by URL, that have its URLs, if any."""
    takedowns = corpus.takedowns()
    wanted, attempts = Parts(numbered(corpus.wanted()), by_url), Parts(iter_attempts(corpus), by_url)
    for rows, tried, other in aligned(wanted, attempts, others):
        ledger = with_takedowns(_latest(SCHEMA.empty_table() if tried is None else tried), takedowns)
        if rows is not None:
            yield standing(rows, ledger, takedowns), ledger, other


def standing(wanted: pa.Table, ledger: pa.Table, takedowns: pa.Table) -> pa.Table:
    """Join wanted rows with their outcomes.

    `wanted` has a column `row`, the position of each row among all wanted rows, by which the result is sorted. The
    result has the columns of the ledger, with `source` and `licence` from the current list; `wanted_sha256`, the
    SHA-256 that the list states; and `row`. `status` is null for rows without an outcome yet.
    """
    wanted = wanted.rename_columns({"sha256": "wanted_sha256"})
    joined = wanted.join(ledger.drop_columns(["source", "licence"]), PAIR, join_type="left outer").sort_by("row")
    return with_takedowns(joined, takedowns, "wanted_sha256")


def _latest(attempts: pa.Table) -> pa.Table:
    """Return the latest attempt at every (url, caption), with the number of failed attempts."""
    attempts = attempts.append_column("num_failures", pc.cast(pc.equal(attempts["status"], "failed"), pa.int64()))
    latest = attempts.group_by(PAIR).aggregate([("shard", "max"), ("num_failures", "sum")])
    if latest.num_rows < attempts.num_rows:
        latest = latest.rename_columns({"shard_max": "shard", "num_failures_sum": "num_failures"})
        attempts = attempts.drop_columns("num_failures").join(latest, [*PAIR, "shard"], join_type="inner")
        attempts = attempts.select([*SCHEMA.names, "num_failures"])
    return attempts


def iter_attempts(corpus: Corpus, where: pc.Expression | None = None) -> Iterator[pa.Table]:
    """Yield the rows of all finished shards, ignoring takedowns, in batches; columns as in `SCHEMA`.

    Args:
        corpus: the corpus.
        where: condition on the stored columns (those of `SCHEMA` without `reason` and `shard`); by default, all rows.
    """
    finished = corpus.finished()
    fs, root = corpus.open()
    paths = [f"{root}/{shard.name}.parquet" for shard in finished]
    stored = pa.schema([field for field in SCHEMA if field.name not in ("reason", "shard")])
    for start in range(0, len(paths), _SHARDS_AT_ONCE):
        some = ds.dataset(paths[start : start + _SHARDS_AT_ONCE], schema=stored, filesystem=fs, format="parquet")
        rows = some.to_table(filter=where)
        rows = rows.append_column("shard", pc.divide(pc.cast(rows["key"], pa.int64()), 10**ROW_DIGITS))
        yield _with_reasons(rows)


def having(*, urls: Collection[str], sha256s: Collection[str]) -> pc.Expression:
    """Return the condition of `iter_attempts` for rows with one of these URLs or SHA-256s."""
    wanted = {"url": urls, "sha256": sha256s}
    by_url, by_sha256 = (pc.field(name).isin(pa.array(values, pa.string())) for name, values in wanted.items())
    return by_url | by_sha256


def with_takedowns(rows: pa.Table, takedowns: pa.Table, *hash_columns: str) -> pa.Table:
    """Mark rows as failed if their URL or a hash (`sha256` or one of `hash_columns`) was taken down."""
    if takedowns.num_rows == 0:
        return rows
    taken = pc.is_in(rows["url"], takedowns["url"].drop_null())
    for column in ("sha256", *hash_columns):
        taken = pc.or_(taken, pc.is_in(rows[column], takedowns["sha256"].drop_null()))
    for column, value in (("status", "failed"), ("reason", str(Reason.TAKEN_DOWN)), ("error_message", None)):
        values = pc.if_else(taken, pa.scalar(value, pa.string()), rows[column])
        rows = rows.set_column(rows.column_names.index(column), column, values)
    return rows


def _with_reasons(rows: pa.Table) -> pa.Table:
    """Reduce img2dataset's status to success or failed, and add the reason of failures."""
    succeeded = pc.fill_null(pc.equal(rows["status"], "success"), False)
    status = pc.if_else(succeeded, "success", "failed")
    messages = rows["error_message"].combine_chunks().dictionary_encode(null_encoding="encode")
    reasons = pa.array([str(reason_of(message)) for message in messages.dictionary.to_pylist()], pa.string())
    reason = pc.if_else(succeeded, pa.scalar(None, pa.string()), reasons.take(messages.indices))
    rows = rows.set_column(rows.column_names.index("status"), "status", status).append_column("reason", reason)
    return rows.select(SCHEMA.names).cast(SCHEMA)
