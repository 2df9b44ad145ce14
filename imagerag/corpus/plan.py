"""Planning a download: rows that a corpus wants and lacks become plans of shards, written before any is fetched."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imagerag.corpus.corpus import Corpus
from imagerag.corpus.guard import PASSING, Reason
from imagerag.corpus.ledger import PAIR, read_parts_with
from imagerag.corpus.shards import PLAN_SCHEMA, Shard
from imagerag.storage.spool import Parts, Spool, by_url, distinct, in_order, numbered

_NONE_BEGUN = pa.schema([(name, pa.string()) for name in PAIR] + [("row", pa.int64())]).empty_table()
_MAX_FAILED_RUNS = 5  # of a URL, after which only `retry_failed` tries it again


def want(corpus: Corpus, rows: Spool, mode: Literal["add", "replace"]) -> int:
    """Add `rows` to those that the corpus wants, or replace these by them; return how many are no longer wanted.

    This changes nothing if the corpus last got the same list.
    """
    digest = rows.digest()
    last, is_all = corpus.last_list()
    if digest == last and (is_all or mode == "add"):
        return 0
    before = corpus.wanted()
    if (first := next(before, None)) is None:
        corpus.want(rows, digest, is_all=True)
        return 0
    before_too = distinct(chain(rows, [first], before))
    if mode == "add":
        corpus.want(before_too, digest)
        return 0
    num_removed = sum(map(len, before_too)) - rows.num_rows
    corpus.want(rows, digest, is_all=True)
    return num_removed


@dataclass(frozen=True)
class Work:
    """The rows to fetch, by shard. They are read from the shards' plans only when needed."""

    num_rows: dict[Shard, int]
    still_wanted: dict[Shard, npt.NDArray[np.bool_]]
    """Which rows of its plan are to be fetched, for shards that an earlier run left unfinished; of others, all are."""

    def rows(self, shard: Shard) -> pa.Table:
        """Return the rows of a shard; columns as in `PLAN_SCHEMA`."""
        rows, chosen = shard.plan(), self.still_wanted.get(shard)
        return rows if chosen is None else rows.filter(pa.array(chosen))


def plan(corpus: Corpus, shard_size: int, *, retry_failed: bool, refresh: bool = False) -> Work:
    """Plan new shards; return what to fetch: still wanted rows of unfinished shards, then the new shards."""
    # Read before the ledger: a shard that a worker without a driver finishes meanwhile is in at least one of the two.
    planned, finished = corpus.planned(), {*corpus.finished()}
    unfinished = [shard for shard in planned if shard not in finished]
    begun, sizes = _begun(corpus, unfinished)
    still_wanted = np.zeros(begun.num_rows, np.bool_)

    def new() -> Iterator[pa.Table]:
        for rows, ledger, own in read_parts_with(corpus, begun):
            own = _NONE_BEGUN if own is None else own
            rows = rows.filter(pc.fill_null(pc.not_equal(rows["reason"], str(Reason.TAKEN_DOWN)), True))
            still_wanted[own.join(rows.select(PAIR), PAIR, join_type="left semi")["row"].to_numpy()] = True
            is_known = _is_refreshable(rows) if refresh else pa.repeat(False, len(rows))
            rows = rows.append_column("is_known", is_known).filter(pc.or_(_is_to_fetch(rows, retry_failed), is_known))
            yield _with_expected_hash(rows.join(own.select(PAIR), PAIR, join_type="left anti"), ledger)

    new_rows = {}
    first = max((shard.id for shard in (*planned, *finished)), default=-1) + 1
    for id, rows in enumerate(_cut(in_order(new()), shard_size), first):
        shard = corpus.shard(id)
        shard.write_plan(rows)
        new_rows[shard] = rows.num_rows
    pieces = np.split(still_wanted, np.cumsum(sizes[:-1], dtype=np.int64))  # of no shards, there is one empty piece
    chosen = dict(zip(unfinished, pieces, strict=False))
    begun_rows = {shard: int(np.count_nonzero(each)) for shard, each in chosen.items() if each.any()}
    return Work(begun_rows | new_rows, chosen)


def _begun(corpus: Corpus, unfinished: Sequence[Shard]) -> tuple[Parts, list[int]]:
    """Return the planned rows of unfinished shards, by URL and with their positions, and the number of rows of each.

    If a corpus's first run was killed, these are all of its rows: they are spilled, and joined part by part.
    """
    sizes: list[int] = []

    def pairs() -> Iterator[pa.Table]:
        for rows in corpus.plans(unfinished):
            sizes.append(rows.num_rows)
            yield rows.select(PAIR)

    return Parts(numbered(pairs()), by_url), sizes


def _cut(tables: Iterable[pa.Table], shard_size: int) -> Iterator[pa.Table]:
    """Cut rows into shards with the columns of `PLAN_SCHEMA`; a shard's rows have the same folder, or none."""
    waiting: dict[str | None, pa.Table] = {}
    for table in tables:
        for folder in table["folder"].unique():
            is_its = pc.equal(table["folder"], folder) if folder.is_valid else pc.is_null(table["folder"])
            rows = table.filter(is_its).select(PLAN_SCHEMA.names)
            rows = pa.concat_tables([it for it in (waiting.pop(folder.as_py(), None), rows) if it is not None])
            end = rows.num_rows - rows.num_rows % shard_size
            yield from (rows.slice(start, shard_size) for start in range(0, end, shard_size))
            waiting[folder.as_py()] = rows.slice(end)
    yield from (rows for rows in waiting.values() if rows.num_rows)


def _is_refreshable(rows: pa.Table) -> pa.ChunkedArray:
    """Return which rows have an image that their URL may have replaced since."""
    has_image = pc.fill_null(pc.equal(rows["status"], "success"), False)
    return pc.and_(has_image, pc.and_(pc.is_null(rows["wanted_sha256"]), pc.is_null(rows["folder"])))


def _is_to_fetch(rows: pa.Table, retry_failed: bool) -> pa.ChunkedArray:
    """Return which rows were never tried, were tried with another expected SHA-256, or failed and are retried."""
    known_sha256 = pc.if_else(pc.equal(rows["status"], "success"), rows["sha256"], rows["expected_sha256"])
    changed = pc.and_(
        pc.is_valid(rows["wanted_sha256"]), pc.fill_null(pc.not_equal(rows["wanted_sha256"], known_sha256), True)
    )
    failed = pc.fill_null(pc.equal(rows["status"], "failed"), False)
    passing = pc.is_in(rows["reason"], pa.array(sorted(map(str, PASSING))))
    again = pc.or_(pc.and_(passing, pc.fill_null(pc.less(rows["num_failures"], _MAX_FAILED_RUNS), True)), retry_failed)
    return pc.or_(pc.or_(pc.is_null(rows["status"]), changed), pc.and_(failed, again))


def _with_expected_hash(rows: pa.Table, ledger: pa.Table) -> pa.Table:
    """Return rows of a plan with the SHA-256 that files must have: the list's, or else that of an earlier fetch.

    Rows that are requested again have no expected SHA-256, but the known one.
    """
    fetched = ledger.filter(pc.equal(ledger["status"], "success")).sort_by("shard")
    recorded = fetched.group_by("url", use_threads=False).aggregate([("sha256", "last")])
    rows = rows.drop_columns("expected_sha256").join(recorded, "url").sort_by("row")
    rows = rows.rename_columns({"sha256": "known_sha256"})
    is_known, nothing = rows["is_known"], pa.scalar(None, pa.string())
    for name in ("known_sha256", "etag", "last_modified"):
        rows = rows.set_column(rows.column_names.index(name), name, pc.if_else(is_known, rows[name], nothing))
    expected = pc.coalesce(rows["wanted_sha256"], rows["sha256_last"])
    rows = rows.append_column("expected_sha256", pc.if_else(is_known, nothing, expected))
    return rows.select([*PLAN_SCHEMA.names, "row"])
