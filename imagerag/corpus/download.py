"""Downloading what a corpus wants: plan shards, run them as Ray tasks, and count the outcomes of all URLs."""

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, Literal
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc

from imagerag.artifacts import Download
from imagerag.compute import start_ray
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.guard import Reason
from imagerag.corpus.hosts import Hosts
from imagerag.corpus.ledger import read_parts
from imagerag.corpus.plan import Work, plan, want
from imagerag.corpus.shards import FetchedShard, Shard
from imagerag.corpus.takedown import remove_taken_down
from imagerag.corpus.url_list import UrlList
from imagerag.errors import UserError
from imagerag.plain import printable
from imagerag.progress import OnProgress, silent
from imagerag.settings import Settings
from imagerag.storage.locks import check_locks

_SHARD_RETRIES = 3
_NUM_EXAMPLES = 3  # per reason in a report
_WORKER_BYTES = 250 * 2**20
BYTES_PER_PIXEL = 21  # peak while an image is decoded, rotated and converted: measured 13 for PNG, 14 JPEG, 21 WebP
_PATIENCE_S = 300.0  # added to the longest time that a shard can take before its worker counts as dead

_log = logging.getLogger(__name__)


def download(
    url_list: UrlList,
    *,
    corpus: Corpus,
    config: DownloadConfig,
    settings: Settings,
    mode: Literal["add", "replace"] = "add",
    retry_failed: bool = False,
    refresh: bool = False,
    on_progress: OnProgress = silent,
) -> Download:
    """Add a list to the rows that a corpus wants, or replace them by the list, and fetch what is missing.

    This fetches URLs that were never tried, that an earlier run left unfinished, or for which the list has a new
    caption or SHA-256; and it retries transient failures, in at most five runs, or with `retry_failed` all failures. A
    URL that was fetched before must return the same bytes again, unless the list states another SHA-256. A run that was
    killed at any time is continued by the next call. If nothing changed since a call that fetched nothing, its outcomes
    are returned.

    With `refresh`, all images that were fetched by URL, and whose SHA-256 no list states, are requested again,
    conditionally on the version that their servers stated. A changed image replaces the previous one, which stays if
    the request fails, unless the server opts out.

    Progress counts URLs. Images that several lists want are fetched once. Concurrent calls for a corpus wait for each
    other.

    Raises:
        UserError: if DNS does not work on a worker's machine.
    """
    started = time.monotonic()
    with corpus.lock(on_wait=lambda said: on_progress(0, 0, said)):
        num_removed = want(corpus, url_list.rows, mode)
        fetched: list[FetchedShard] = []
        memo = corpus.outcomes()
        outcomes = None if retry_failed or refresh else memo.recall()
        if outcomes is None:
            work = plan(corpus, config.shard_size, retry_failed=retry_failed, refresh=refresh)
            fetched += _fetch(work, config, settings, on_progress)
            remove_taken_down(corpus)
            outcomes = _count(corpus)
            if not work.num_rows and corpus.state() == memo.state:  # a worker without a driver may have changed it
                memo.keep(outcomes)
    num_rows, examples = outcomes["num_rows"], outcomes["examples"]
    counts = Counter(outcomes["counts"])
    num_failed = counts.total()
    if url_list.num_invalid:
        counts[str(Reason.INVALID_ROW)] = url_list.num_invalid
        examples[str(Reason.INVALID_ROW)] = url_list.invalid
    return Download(
        uri=corpus.uri,
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


def _count(corpus: Corpus) -> dict[str, Any]:
    """Return the number of wanted rows, the numbers of failures by reason, and messages about the first of each."""
    num_rows, counts = 0, Counter[str]()
    first: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for rows, _ in read_parts(corpus):
        num_rows += rows.num_rows
        failed = rows.filter(pc.fill_null(pc.not_equal(rows["status"], "success"), True))
        reasons = failed["reason"].fill_null(str(Reason.LOST))
        for reason, count in (tuple(each.values()) for each in reasons.value_counts().to_pylist()):
            counts[reason] += count
            some = failed.filter(pc.equal(reasons, reason)).slice(0, _NUM_EXAMPLES).to_pylist()
            said = [(row["row"], f"{row['url']:.200}: {row['error_message'] or reason}") for row in some]
            first[reason] = sorted(first[reason] + said)[:_NUM_EXAMPLES]
    examples = {reason: [printable(said) for _, said in some] for reason, some in first.items()}
    return {"num_rows": num_rows, "counts": counts, "examples": examples}


def _fetch(work: Work, config: DownloadConfig, settings: Settings, on_progress: OnProgress) -> Iterator[FetchedShard]:
    """Fetch shards on all workers and yield their results; a shard whose workers keep dying stays unfinished."""
    if not work.num_rows:
        return
    start_ray(settings)
    import ray

    num_workers = min(len(work.num_rows), _num_cores())
    fetch, run = _fetch_task(config), uuid4().hex
    longest_s = _longest_s(max(work.num_rows.values()), Hosts(config, num_workers))
    waiting = [(shard, 0) for shard in reversed(work.num_rows)]
    running: dict[ray.ObjectRef, tuple[Shard, int]] = {}
    done, total = 0, sum(work.num_rows.values())
    on_progress(done, total)
    while waiting or running:
        while waiting and len(running) < 2 * _num_cores():
            shard, attempt = waiting.pop()
            running[fetch.remote(shard, work.rows(shard), config, run, num_workers)] = shard, attempt
        check_locks()
        ready, stuck = ray.wait(list(running), timeout=longest_s)
        for ref in ready or stuck:
            shard, attempt = running.pop(ref)
            try:
                if not ready:
                    ray.cancel(ref, force=True)
                    raise TimeoutError("its worker gave no sign of life")
                fetched: FetchedShard = ray.get(ref)
            except UserError as error:  # which another attempt would not solve
                for other in running:
                    ray.cancel(other, force=True)
                raise UserError(str(getattr(error, "cause", error))) from None
            except (ray.exceptions.RayError, TimeoutError) as error:
                _log.warning("shard %d, attempt %d of %d: %s", shard.id, attempt + 1, 1 + _SHARD_RETRIES, error)
                if attempt < _SHARD_RETRIES:
                    waiting.append((shard, attempt + 1))
                on_progress(done, total, f"shard {shard.id} lost its worker ({attempt + 1} of {1 + _SHARD_RETRIES})")
            else:
                done += fetched.num_urls
                on_progress(done, total, f"shard {shard.id} finished")
                yield fetched


def _num_cores() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _fetch_task(config: DownloadConfig) -> Any:
    """Return `_fetch_shard` as a Ray task that reserves a core and a worker's peak memory."""
    import ray

    # Ray starts only as many tasks on a machine as it has cores and memory for.
    most = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
    # A worker's peak: the process, the files that it holds, and the largest image while decoding.
    peak = _WORKER_BYTES + config.in_flight_bytes + BYTES_PER_PIXEL * config.max_pixels
    return ray.remote(num_cpus=1, max_retries=0, memory=int(min(peak, most)))(_fetch_shard)


def _fetch_shard(shard: Shard, rows: pa.Table, config: DownloadConfig, run: str, num_workers: int) -> FetchedShard:
    from imagerag.corpus.fetch import fetch_shard, hosts_of

    return fetch_shard(shard, rows, config, hosts_of(run, config, num_workers))


def _longest_s(num_urls: int, hosts: Hosts) -> float:
    """Return the maximum seconds that a shard can take, if every URL takes as long as it may."""
    config = hosts.config
    num_rounds = math.ceil(num_urls / min(config.thread_count, hosts.most_at_once))
    return _PATIENCE_S + hosts.patience_s(num_urls) + num_rounds * config.timeout_s * (1 + config.retries)
