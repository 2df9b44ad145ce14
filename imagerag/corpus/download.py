"""Downloading what a corpus wants: plan shards, run them as Ray tasks, and count the outcomes of all URLs."""

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc

from imagerag.artifacts import Download
from imagerag.compute import start_ray
from imagerag.corpus import shards
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.guard import PASSING, Reason
from imagerag.corpus.hosts import Hosts
from imagerag.corpus.ledger import PAIR, read_parts
from imagerag.corpus.takedown import remove_taken_down
from imagerag.corpus.url_list import UrlList
from imagerag.errors import UserError
from imagerag.plain import printable
from imagerag.progress import OnProgress, silent
from imagerag.settings import Settings
from imagerag.storage.locks import check_locks
from imagerag.storage.spool import Spool, distinct, in_order

_SHARD_RETRIES = 3
_MAX_FAILED_RUNS = 5  # of a URL, after which only `retry_failed` tries it again
_NUM_EXAMPLES = 3  # per reason in a report
_WORKER_BYTES = 400 * 2**20
BYTES_PER_PIXEL = 21  # peak while an image is decoded, rotated and converted: measured 13 for PNG, 14 JPEG, 21 WebP
_PATIENCE_S = 300.0  # added to the longest time that a shard can take before its worker counts as dead

_log = logging.getLogger(__name__)


def download(
    url_list: UrlList,
    *,
    uri: str,
    config: DownloadConfig,
    settings: Settings,
    mode: Literal["add", "replace"] = "add",
    retry_failed: bool = False,
    refresh: bool = False,
    on_progress: OnProgress = silent,
) -> Download:
    """Add a list to the rows that the corpus at `uri` wants, or replace them by the list, and fetch what is missing.

    This fetches URLs that were never tried, that an earlier run left unfinished, or for which the list has a new
    caption or SHA-256; and it retries transient failures, in at most five runs, or with `retry_failed` all failures. A
    URL that was fetched before must return the same bytes again, unless the list states another SHA-256. A run that was
    killed at any time is continued by the next call.

    With `refresh`, all images that were fetched by URL, and whose SHA-256 no list states, are requested again,
    conditionally on the version that their servers stated. A changed image replaces the previous one, which stays if
    the request fails, unless the server opts out.

    Progress counts URLs. Images that several lists want are fetched once. Concurrent calls for a corpus wait for each
    other.

    Raises:
        UserError: if DNS does not work on a worker's machine.
    """
    started = time.monotonic()
    with shards.locked(uri, on_wait=lambda said: on_progress(0, 0, said)):
        num_removed = _want(uri, url_list.rows, mode)
        work = _plan(uri, config.shard_size, retry_failed=retry_failed, refresh=refresh)
        fetched = list(_fetch(work, uri, config, settings, on_progress))
        remove_taken_down(uri)
        num_rows, counts, examples = _count(uri)
    num_failed = counts.total()
    if url_list.num_invalid:
        counts[str(Reason.INVALID_ROW)] = url_list.num_invalid
        examples[str(Reason.INVALID_ROW)] = url_list.invalid
    return Download(
        uri=uri,
        num_urls=num_rows + url_list.num_invalid,
        num_success=num_rows - num_failed,
        num_failed=num_failed + url_list.num_invalid,
        reasons=dict(counts.most_common()),
        examples=examples,
        num_fetched=sum(shard.num_urls for shard in fetched),
        num_removed=num_removed,
        num_bytes=sum(shard.num_bytes for shard in fetched),
        num_duplicates=url_list.num_duplicates,
        duration_s=time.monotonic() - started,
        machine_s=sum(shard.duration_s for shard in fetched),
        num_unchanged=sum(shard.num_unchanged for shard in fetched),
        num_changed=sum(shard.num_changed for shard in fetched),
        kept=dict(sum((Counter(shard.kept) for shard in fetched), Counter[str]())),
    )


def _count(uri: str) -> tuple[int, Counter[str], dict[str, Sequence[str]]]:
    """Return the number of wanted rows, the numbers of failures by reason, and messages about the first of each."""
    num_rows, counts = 0, Counter[str]()
    first: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for rows, _ in read_parts(uri):
        num_rows += rows.num_rows
        failed = rows.filter(pc.fill_null(pc.not_equal(rows["status"], "success"), True))
        reasons = failed["reason"].fill_null(str(Reason.LOST))
        for reason, count in (tuple(each.values()) for each in reasons.value_counts().to_pylist()):
            counts[reason] += count
            some = failed.filter(pc.equal(reasons, reason)).slice(0, _NUM_EXAMPLES).to_pylist()
            said = [(row["row"], f"{row['url']:.200}: {row['error_message'] or reason}") for row in some]
            first[reason] = sorted(first[reason] + said)[:_NUM_EXAMPLES]
    return num_rows, counts, {reason: tuple(printable(said) for _, said in some) for reason, some in first.items()}


def _want(uri: str, rows: Spool, mode: Literal["add", "replace"]) -> int:
    """Add `rows` to those that the corpus wants, or replace these by them; return how many are no longer wanted."""
    before = shards.iter_wanted(uri)
    if (first := next(before, None)) is None:
        shards.write_wanted(uri, rows)
        return 0
    before_too = distinct(chain(rows, [first], before))
    if mode == "add":
        shards.write_wanted(uri, before_too)
        return 0
    num_removed = sum(map(len, before_too)) - rows.num_rows
    shards.write_wanted(uri, rows)
    return num_removed


@dataclass(frozen=True)
class _Work:
    """The rows to fetch, by shard. Rows of new shards are read from their plans only when needed."""

    uri: str
    num_rows: dict[int, int]
    unfinished: dict[int, pa.Table]

    def rows(self, shard: int) -> pa.Table:
        if shard in self.unfinished:
            return self.unfinished[shard]
        return shards.read_plans(self.uri, [shard])[shard]


def _plan(uri: str, shard_size: int, *, retry_failed: bool, refresh: bool = False) -> _Work:
    """Plan new shards; return what to fetch: still wanted rows of unfinished shards, then the new shards."""
    # Read before the ledger: a shard that a worker without a driver finishes meanwhile is in at least one of the two.
    planned, finished = shards.planned_shards(uri), shards.finished_shards(uri)
    unfinished = shards.read_plans(uri, [shard for shard in planned if shard not in finished])
    begun = pa.concat_tables([shards.PLAN_SCHEMA.empty_table(), *unfinished.values()]).select(PAIR)
    wanted = [begun.slice(0, 0)]

    def new() -> Iterator[pa.Table]:
        for rows, ledger in read_parts(uri):
            rows = rows.filter(pc.fill_null(pc.not_equal(rows["reason"], str(Reason.TAKEN_DOWN)), True))
            still = rows.select(PAIR).join(begun, PAIR, join_type="left semi")
            if still.num_rows:  # an empty table may keep the table that it is a slice of
                wanted.append(still)
            is_known = _is_refreshable(rows) if refresh else pa.repeat(False, len(rows))
            rows = rows.append_column("is_known", is_known).filter(pc.or_(_is_to_fetch(rows, retry_failed), is_known))
            yield _with_expected_hash(rows.join(begun, PAIR, join_type="left anti"), ledger)

    num_rows = {}
    next_shard = max([*planned, *finished], default=-1) + 1
    for shard, rows in enumerate(_shards_of(in_order(new()), shard_size), next_shard):
        shards.write_plan(uri, shard, rows)
        num_rows[shard] = rows.num_rows
    still_wanted = pa.concat_tables(wanted)
    narrowed = {shard: plan.join(still_wanted, PAIR, join_type="left semi") for shard, plan in unfinished.items()}
    num_rows = {shard: plan.num_rows for shard, plan in narrowed.items() if plan.num_rows} | num_rows
    return _Work(uri, num_rows, narrowed)


def _shards_of(tables: Iterable[pa.Table], shard_size: int) -> Iterator[pa.Table]:
    """Cut rows into shards with the columns of `shards.PLAN_SCHEMA`; a shard's rows have the same folder, or none."""
    waiting: dict[str | None, pa.Table] = {}
    for table in tables:
        for folder in table["folder"].unique():
            is_its = pc.equal(table["folder"], folder) if folder.is_valid else pc.is_null(table["folder"])
            rows = table.filter(is_its).select(shards.PLAN_SCHEMA.names)
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
    return rows.select([*shards.PLAN_SCHEMA.names, "row"])


def _fetch(
    work: _Work, uri: str, config: DownloadConfig, settings: Settings, on_progress: OnProgress
) -> Iterator[shards.FetchedShard]:
    """Fetch shards on all workers and yield their results; a shard whose workers keep dying stays unfinished."""
    if not work.num_rows:
        return
    start_ray(settings)
    import ray

    fs, root = shards.open_folder(uri)
    absolute_uri = fs.unstrip_protocol(root)  # workers may have another working directory
    # Ray starts only as many tasks on a machine as it has cores and memory for.
    most = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
    task = ray.remote(num_cpus=1, max_retries=0, memory=int(min(_peak_bytes(config), most)))(_fetch_shard)
    run, num_cores = uuid4().hex, max(1, int(ray.cluster_resources().get("CPU", 1)))
    num_workers = min(len(work.num_rows), num_cores)
    longest_s = _longest_s(max(work.num_rows.values()), Hosts(config, num_workers))
    waiting = [(shard, 0) for shard in reversed(work.num_rows)]
    running: dict[ray.ObjectRef, tuple[int, int]] = {}
    done, total = 0, sum(work.num_rows.values())
    on_progress(done, total)
    while waiting or running:
        while waiting and len(running) < 2 * max(1, int(ray.cluster_resources().get("CPU", 1))):
            shard, attempt = waiting.pop()
            running[task.remote(absolute_uri, shard, work.rows(shard), config, run, num_workers)] = shard, attempt
        check_locks()
        ready, stuck = ray.wait(list(running), timeout=longest_s)
        for ref in ready or stuck:
            shard, attempt = running.pop(ref)
            try:
                if not ready:
                    ray.cancel(ref, force=True)
                    raise TimeoutError("its worker gave no sign of life")
                fetched: shards.FetchedShard = ray.get(ref)
            except UserError as error:  # which another attempt would not solve
                for other in running:
                    ray.cancel(other, force=True)
                raise UserError(str(getattr(error, "cause", error))) from None
            except (ray.exceptions.RayError, TimeoutError) as error:
                _log.warning("shard %d, attempt %d of %d: %s", shard, attempt + 1, 1 + _SHARD_RETRIES, error)
                if attempt < _SHARD_RETRIES:
                    waiting.append((shard, attempt + 1))
                on_progress(done, total, f"shard {shard} lost its worker ({attempt + 1} of {1 + _SHARD_RETRIES})")
            else:
                done += fetched.num_urls
                on_progress(done, total, f"shard {shard} finished")
                yield fetched


def _fetch_shard(
    uri: str, shard: int, rows: pa.Table, config: DownloadConfig, run: str, num_workers: int
) -> shards.FetchedShard:
    from imagerag.corpus.fetch import fetch_shard, hosts_of

    return fetch_shard(uri, shard, rows, config, hosts_of(run, config, num_workers))


def _peak_bytes(config: DownloadConfig) -> int:
    """Return a worker's peak memory: the process, the files that it holds, and the largest image while decoding."""
    return _WORKER_BYTES + max(config.max_bytes, shards.IN_FLIGHT_BYTES) + BYTES_PER_PIXEL * config.max_pixels


def _longest_s(num_urls: int, hosts: Hosts) -> float:
    """Return the maximum seconds that a shard can take, if every URL takes as long as it may."""
    config = hosts.config
    num_rounds = math.ceil(num_urls / min(config.thread_count, hosts.most_at_once))
    return _PATIENCE_S + hosts.patience_s(num_urls) + num_rounds * config.timeout_s * (1 + config.retries)
