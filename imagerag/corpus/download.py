"""Bringing a corpus to what its lists want: plan shards, spread them as Ray tasks, count what came of every URL."""

import logging
import math
import time
from collections.abc import Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from imagerag.artifacts import Download
from imagerag.compute import start_ray
from imagerag.corpus import shards
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.guard import Reason
from imagerag.corpus.ledger import PAIR, read_ledger, read_standing, standing
from imagerag.corpus.takedown import remove_taken_down
from imagerag.corpus.url_list import UrlList, fold
from imagerag.locks import check_locks
from imagerag.plain import printable
from imagerag.progress import OnProgress, silent
from imagerag.settings import Settings

_SHARD_RETRIES = 3
_NUM_EXAMPLES = 3  # of each reason, in a report
_WORKER_BYTES = 400 * 2**20
BYTES_PER_PIXEL = 21  # while an image is decoded, turned and converted: measured 13 for PNG, 14 for JPEG, 21 for WebP
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
    on_progress: OnProgress = silent,
) -> Download:
    """Add a list to what the corpus at `uri` wants, or put it in its place, and fetch what is missing.

    Fetched is what was never tried, what an earlier run left unfinished and what the list has a new caption or a new
    SHA-256 for; with `retry_failed` also what failed. A URL that was fetched before has to bring the same bytes again,
    unless the list states another SHA-256. Killed at any moment, it continues when it is called again.

    Progress counts URLs. Images that several lists want are fetched once; two calls for one corpus wait for each other.
    """
    started = time.monotonic()
    with shards.locked(uri, on_wait=lambda said: on_progress(0, 0, said)):
        num_removed = _want(uri, url_list.table, mode)
        work = _plan(uri, config.shard_size, retry_failed=retry_failed)
        fetched = list(_fetch(work, uri, config, settings, on_progress))
        remove_taken_down(uri)
        outcome = read_standing(uri)
    failed = outcome.filter(pc.fill_null(pc.not_equal(outcome["status"], "success"), True))
    failed = failed.set_column(
        failed.column_names.index("reason"), "reason", failed["reason"].fill_null(str(Reason.LOST))
    )
    counts = {count["values"]: count["counts"] for count in failed["reason"].value_counts().to_pylist()}
    examples = {reason: _examples(failed, reason) for reason in counts}
    if url_list.num_invalid:
        counts[str(Reason.INVALID_ROW)] = url_list.num_invalid
        examples[str(Reason.INVALID_ROW)] = url_list.invalid
    return Download(
        uri=uri,
        num_urls=outcome.num_rows + url_list.num_invalid,
        num_success=outcome.num_rows - failed.num_rows,
        num_failed=failed.num_rows + url_list.num_invalid,
        reasons=dict(sorted(counts.items(), key=lambda count: -count[1])),
        examples=examples,
        num_fetched=sum(shard.num_urls for shard in fetched),
        num_removed=num_removed,
        num_bytes=sum(shard.num_bytes for shard in fetched),
        num_duplicates=url_list.num_duplicates,
        duration_s=time.monotonic() - started,
        machine_s=sum(shard.duration_s for shard in fetched),
    )


def _examples(failed: pa.Table, reason: str) -> tuple[str, ...]:
    """The first failures of a reason: each one's URL and what was said of it."""
    rows = failed.filter(pc.equal(failed["reason"], reason)).slice(0, _NUM_EXAMPLES).to_pylist()
    return tuple(printable(f"{row['url']:.200}: {row['error_message'] or reason}") for row in rows)


def _want(uri: str, rows: pa.Table, mode: Literal["add", "replace"]) -> int:
    """Make the corpus want `rows`; return how many it wants no more."""
    before, wanted = shards.update_wanted(
        uri, lambda before: rows if mode == "replace" else fold(pa.concat_tables([rows, before]))
    )
    removed = before.select(PAIR).join(wanted.select(PAIR), PAIR, join_type="left anti")
    return int(removed.num_rows)


def _plan(uri: str, shard_size: int, *, retry_failed: bool) -> dict[int, pa.Table]:
    """The rows to fetch, by shard: those of unfinished shards that are still wanted, then new shards, planned here."""
    # Before the ledger: a worker that outlived its driver may finish a shard meanwhile, which then is in one or both.
    planned, finished = shards.planned_shards(uri), shards.finished_shards(uri)
    unfinished = shards.read_plans(uri, [shard for shard in planned if shard not in finished])
    ledger = read_ledger(uri)
    rows = standing(shards.read_wanted(uri), ledger, shards.read_takedowns(uri))
    rows = rows.filter(pc.fill_null(pc.not_equal(rows["reason"], str(Reason.TAKEN_DOWN)), True))
    work = {shard: plan.join(rows.select(PAIR), PAIR, join_type="left semi") for shard, plan in unfinished.items()}

    new = rows.filter(_is_to_fetch(rows, retry_failed))
    if unfinished:
        new = new.join(pa.concat_tables(unfinished.values()).select(PAIR), PAIR, join_type="left anti")
    new = _with_expected_hash(new, ledger)
    next_shard = max([*planned, *finished], default=-1) + 1
    for part in _by_folder(new):
        for start in range(0, part.num_rows, shard_size):
            work[next_shard] = part.slice(start, shard_size)
            shards.write_plan(uri, next_shard, work[next_shard])
            next_shard += 1
    return {shard: plan for shard, plan in work.items() if plan.num_rows > 0}


def _by_folder(rows: pa.Table) -> Iterator[pa.Table]:
    """The parts whose rows can share a shard, as `shards.PLAN_SCHEMA` has it."""
    for folder in rows["folder"].unique():
        yield rows.filter(pc.equal(rows["folder"], folder) if folder.is_valid else pc.is_null(rows["folder"]))


def _is_to_fetch(rows: pa.Table, retry_failed: bool) -> pa.ChunkedArray:
    """Which rows were never tried, were tried with another SHA-256 in mind, or, with `retry_failed`, failed."""
    known_sha256 = pc.if_else(pc.equal(rows["status"], "success"), rows["sha256"], rows["expected_sha256"])
    changed = pc.and_(
        pc.is_valid(rows["wanted_sha256"]), pc.fill_null(pc.not_equal(rows["wanted_sha256"], known_sha256), True)
    )
    failed = pc.fill_null(pc.equal(rows["status"], "failed"), False)
    return pc.or_(pc.or_(pc.is_null(rows["status"]), changed), pc.and_(failed, retry_failed))


def _with_expected_hash(rows: pa.Table, ledger: pa.Table) -> pa.Table:
    """Rows of a plan: the file has to be the one that the list states, else the one that its URL brought before."""
    fetched = ledger.filter(pc.equal(ledger["status"], "success")).sort_by("shard")
    recorded = fetched.group_by("url", use_threads=False).aggregate([("sha256", "last")])
    rows = rows.drop_columns(["sha256", "expected_sha256"]).join(recorded, "url").sort_by("row")
    rows = rows.append_column("expected_sha256", pc.coalesce(rows["wanted_sha256"], rows["sha256_last"]))
    return rows.select(shards.PLAN_SCHEMA.names)


def _fetch(
    work: dict[int, pa.Table], uri: str, config: DownloadConfig, settings: Settings, on_progress: OnProgress
) -> Iterator[shards.FetchedShard]:
    """Fetch shards on all workers and yield what came of each; one whose workers keep dying stays unfinished."""
    if not work:
        return
    start_ray(settings)
    import ray

    fs, root = shards.open_folder(uri)
    absolute_uri = fs.unstrip_protocol(root)  # workers may run in another folder
    # Ray starts no more of them on a machine than have their cores, and their memory, there.
    most = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
    task = ray.remote(num_cpus=1, max_retries=0, memory=int(min(_peak_bytes(config), most)))(_fetch_shard)
    waiting = [(shard, 0) for shard in reversed(work)]
    running: dict[ray.ObjectRef, tuple[int, int]] = {}
    done, total = 0, sum(rows.num_rows for rows in work.values())
    on_progress(done, total)
    while waiting or running:
        while waiting and len(running) < 2 * max(1, int(ray.cluster_resources().get("CPU", 1))):
            shard, attempt = waiting.pop()
            running[task.remote(absolute_uri, shard, work[shard], config)] = shard, attempt
        check_locks()
        ready, stuck = ray.wait(list(running), timeout=_longest_s(work, config))
        for ref in ready or stuck:
            shard, attempt = running.pop(ref)
            try:
                if not ready:
                    ray.cancel(ref, force=True)
                    raise TimeoutError("its worker gave no sign of life")
                fetched: shards.FetchedShard = ray.get(ref)
            except (ray.exceptions.RayError, TimeoutError) as error:
                _log.warning("shard %d, attempt %d of %d: %s", shard, attempt + 1, 1 + _SHARD_RETRIES, error)
                if attempt < _SHARD_RETRIES:
                    waiting.append((shard, attempt + 1))
                on_progress(done, total, f"shard {shard} lost its worker ({attempt + 1} of {1 + _SHARD_RETRIES})")
            else:
                done += fetched.num_urls
                on_progress(done, total, f"shard {shard} finished")
                yield fetched


def _fetch_shard(uri: str, shard: int, rows: pa.Table, config: DownloadConfig) -> shards.FetchedShard:
    from imagerag.corpus.fetch import fetch_shard

    return fetch_shard(uri, shard, rows, config)


def _peak_bytes(config: DownloadConfig) -> int:
    """What a worker needs at most: itself, the files that it holds, and the largest image while it is decoded."""
    return _WORKER_BYTES + max(config.max_bytes, shards.IN_FLIGHT_BYTES) + BYTES_PER_PIXEL * config.max_pixels


def _longest_s(work: dict[int, pa.Table], config: DownloadConfig) -> float:
    """The longest time, in seconds, in which some shard has to come to its end, if every URL takes all of its time."""
    num_rounds = math.ceil(max(len(rows) for rows in work.values()) / config.thread_count)
    return _PATIENCE_S + num_rounds * config.timeout_s * (1 + config.retries)
