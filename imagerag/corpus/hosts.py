"""Scheduling of requests per host: limits concurrency and rate, waits if a host asks to, and skips hosts that are down.

Meanwhile, URLs of other hosts are fetched. This module is independent of HTTP: it receives the outcome of each attempt.
"""

import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from threading import Condition
from urllib.parse import urlsplit

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.guard import PASSING, UNREACHABLE, FetchError, Reason

_MAX_BACK_OFF_S = 60.0
_CATCH_UP_S = 0.02  # maximum delay of a wake-up that the next requests may make up for
_MIN_RATE = 0.1
_CUT = 0.97
_GROWTH_S = 40.0  # initial time in which a cut rate doubles
_MAX_GROWTH_S = 240.0
_SLOWEST_RATE = 1.0  # URLs per second: a shard waits for hosts that are at least this fast


class Pace:
    """The request rate of a host: unlimited until the host refuses, then about the rate that it was seen to accept.

    A cut at most halves the rate, which then grows back by a cubic function, as in TCP's CUBIC: slowly at first, and
    more slowly after each further refusal, since every refusal can cost a pause.
    """

    def __init__(self, limit: float, now: float) -> None:
        """Start without knowledge of the host; `limit` is the maximum rate in URLs per second."""
        self._limit = limit
        self._rate = math.inf
        self._growth_s = _GROWTH_S
        self._begun_at = self._resumed_at = now
        self._taken: deque[float] = deque()  # times of answers in the last second
        self.next_at = -math.inf
        """Earliest time of the next request."""

    def rate(self, now: float) -> float:
        """Return the current rate in URLs per second."""
        grown = 1 + (max(0.0, now - self._resumed_at) / self._growth_s) ** 3
        return min(self._limit, self._rate * grown)

    @property
    def is_known(self) -> bool:
        """Whether the host has ever refused a request."""
        return self._rate < math.inf

    def start(self, now: float) -> None:
        """Record a request that starts now."""
        self.next_at = max(self.next_at, now - _CATCH_UP_S, self._resumed_at) + 1 / self.rate(now)

    def taken(self, now: float) -> None:
        """Record an answer of the host."""
        self._taken.append(now)
        self._drop_old(now)

    def refused(self, now: float, resume_at: float) -> None:
        """Cut the rate after a refusal; no request is made before `resume_at`, which is not before `now`."""
        self._drop_old(now)
        seen = float(len(self._taken))
        rate = self.rate(now)
        if math.isinf(rate):
            if not seen:  # other workers took all that the host allows, which tells nothing about this one's share
                self._begun_at = self._resumed_at = self.next_at = resume_at
                return
            rate = seen / min(1.0, max(now - self._begun_at, 0.001))
        elif now - self._resumed_at > 1:
            self._growth_s = min(2 * self._growth_s, _MAX_GROWTH_S)
        self._rate = max(_MIN_RATE, _CUT * min(rate, max(seen, rate / 2)))
        self._resumed_at = self.next_at = resume_at

    def _drop_old(self, now: float) -> None:
        while self._taken and self._taken[0] <= now - 1:
            self._taken.popleft()


@dataclass(eq=False)
class Host:
    """The state of a host."""

    name: str
    pace: Pace
    num_failures: int = 0
    """Consecutive failed rounds; concurrent attempts belong to one round."""
    has_answered: bool = False
    not_before: float = -math.inf
    counted_at: float = -math.inf
    """Time of the last counted failure; attempts that started before it belong to the same round."""
    down: str | None = None
    """Reason why the host is skipped, if it is."""


class Hosts:
    """A worker's knowledge of hosts, kept between the shards of a run.

    Every worker gets an equal share of each host's limits, so that the limits hold for all workers together without
    communication between them. If there are more workers than `per_host`, each still fetches one URL at a time.
    """

    def __init__(
        self, config: DownloadConfig, num_workers: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.clock = clock
        self.most_at_once = max(1, config.per_host // num_workers)
        self._limit = (config.per_host_rate or math.inf) / num_workers
        self._known: dict[str, Host] = {}

    def __getitem__(self, name: str) -> Host:
        if name not in self._known:
            self._known[name] = Host(name, Pace(self._limit if name else math.inf, self.clock()))
        return self._known[name]

    def forget_ordinary(self) -> None:
        """Drop hosts without any state that the next shard needs."""
        now = self.clock()
        self._known = {
            name: host
            for name, host in self._known.items()
            if host.down or host.num_failures or host.pace.is_known or max(host.not_before, host.pace.next_at) > now
        }

    def patience_s(self, num_urls: int) -> float:
        """Return how many seconds a shard of `num_urls` URLs waits for hosts that can't be asked immediately."""
        return self.config.max_wait_s + num_urls / min(_SLOWEST_RATE, self._limit)


@dataclass(eq=False)
class Job:
    """One URL to fetch."""

    index: int
    line: "_Line"
    num_failures: int = 0
    started_at: float = -math.inf
    error: FetchError | None = None
    """The last failure. A job that is handed out with an error is not fetched: the error is its outcome."""


@dataclass(eq=False)
class _Line:
    """The queue of a host's jobs."""

    host: Host
    most_at_once: float
    waiting: list[tuple[float, int, Job]] = field(default_factory=list)  # a heap by earliest start
    num_running: int = 0
    queued_for: float | None = None
    """Its time in `Queue._queue`; entries there with another time are stale."""

    def due_at(self) -> float:
        if self.host.down is not None:
            return -math.inf
        return max(self.waiting[0][0], self.host.not_before, self.host.pace.next_at)


class Queue:
    """The URLs of a shard, handed out to threads as soon as their hosts may be asked."""

    def __init__(self, urls: Sequence[str], hosts: Hosts) -> None:
        self._hosts, self._clock, self._config = hosts, hosts.clock, hosts.config
        self._changed = Condition()
        self._number = itertools.count()
        self._queue: list[tuple[float, int, _Line]] = []  # a heap of hosts with waiting jobs
        self._deadline = self._clock() + hosts.patience_s(len(urls))
        lines: dict[str, _Line] = {}
        for index, url in enumerate(urls):
            name = host_of(url)
            if name not in lines:
                lines[name] = _Line(hosts[name], hosts.most_at_once if name else math.inf)
            line = lines[name]
            heappush(line.waiting, (-math.inf, next(self._number), Job(index, line)))
        for line in lines.values():
            self._enqueue(line)
        self.most_at_once = int(sum(min(len(line.waiting), line.most_at_once) for line in lines.values()))
        """Maximum number of threads that can work at the same time."""

    def take(self) -> Job:
        """Wait for the next job. Report its outcome with `succeeded` or `failed`, unless it has an `error`.

        There are as many jobs to finish as URLs; a call after the last one waits forever.
        """
        with self._changed:
            while True:
                now = self._clock()
                found = self.poll(now)
                if isinstance(found, Job):
                    if self._queue:
                        self._changed.notify()
                    return found
                self._changed.wait(None if math.isinf(found) else found - now)

    def poll(self, now: float) -> Job | float:
        """Return the next job, or the time when there may be one: infinity if that depends on running jobs."""
        while self._queue and self._queue[0][0] <= now:
            queued_for, _, line = heappop(self._queue)
            if queued_for != line.queued_for:
                continue
            line.queued_for = None
            if not line.waiting or line.num_running >= line.most_at_once:
                continue
            due_at = line.due_at()
            error = self._given_up(line, due_at, now)
            if error is None and due_at > now:
                self._enqueue(line)
                continue
            _, _, job = heappop(line.waiting)
            job.error = error
            if error is None:
                job.started_at = now
                line.num_running += 1
                line.host.pace.start(now)
            self._enqueue(line)
            return job
        return self._queue[0][0] if self._queue else math.inf

    def succeeded(self, job: Job) -> None:
        """Record that a job's host answered."""
        with self._changed:
            self._answered(job.line.host)
            self._release(job.line)

    def failed(self, job: Job, error: FetchError) -> bool:
        """Record the failure of a job; return whether it is retried, by any thread that takes it."""
        with self._changed:
            now, host = self._clock(), job.line.host
            job.error = error
            job.num_failures += 1
            again = error.reason in PASSING and job.num_failures <= self._config.retries
            if error.reason is Reason.SERVER_BUSY:
                self._refused(host, job, error, now)
                again = again or self._is_worth_it(host, job)
            elif error.reason in UNREACHABLE:
                self._missed(host, job, error, now)
            else:
                self._answered(host)
            if again:
                wait_s = 0.0 if error.reason is Reason.SERVER_BUSY else self._back_off_s(job.num_failures - 1)
                heappush(job.line.waiting, (now + wait_s, next(self._number), job))
            self._release(job.line)
            return again

    def _answered(self, host: Host) -> None:
        host.pace.taken(self._clock())
        host.has_answered, host.num_failures = True, 0

    def _refused(self, host: Host, job: Job, error: FetchError, now: float) -> None:
        """Handle a request to wait (429, 503): pause the host and cut its rate."""
        is_new = self._counted(host, job, error, now)
        wait_s = error.wait_s or 0.0
        if error.wait_s is None or host.num_failures > 1:
            wait_s = max(wait_s, self._back_off_s(host.num_failures - 1))
        host.not_before = max(host.not_before, now + wait_s)
        if wait_s > self._config.max_wait_s:
            host.down = f"asks to be left alone for {wait_s:.0f} s ({error})"
        if is_new and host.num_failures == 1:  # otherwise no request succeeded since, and only a longer pause can help
            host.pace.refused(now, host.not_before)

    def _is_worth_it(self, host: Host, job: Job) -> bool:
        """Return whether a refusal concerns the rate rather than this URL: the host answers others."""
        most = self._config.max_host_failures
        return host.has_answered and host.num_failures < most and job.num_failures <= self._config.retries + most

    def _missed(self, host: Host, job: Job, error: FetchError, now: float) -> None:
        """Handle a missing answer: the first one may be an accident, later ones pause the host."""
        if self._counted(host, job, error, now) and host.num_failures > 1:
            host.not_before = max(host.not_before, now + self._back_off_s(host.num_failures - 2))

    def _counted(self, host: Host, job: Job, error: FetchError, now: float) -> bool:
        if job.started_at <= host.counted_at or not host.name:
            return False
        host.counted_at = now
        host.num_failures += 1
        is_up = error.reason is Reason.SERVER_BUSY and host.has_answered
        if host.num_failures >= self._config.max_host_failures and not is_up:
            host.down = f"{host.num_failures} failures in a row, the last: {error}"
        return True

    def _given_up(self, line: _Line, due_at: float, now: float) -> FetchError | None:
        """Return the failure with which to give up the line's next job, or None to keep waiting."""
        if line.host.down is not None:
            return FetchError(Reason.HOST_DOWN, f"{line.host.name}: {line.host.down}")
        if due_at > now and due_at > self._deadline:
            error = line.waiting[0][2].error
            return error or FetchError(Reason.SERVER_BUSY, "its turn did not come in `max_wait_s`")
        return None

    def _back_off_s(self, number: int) -> float:
        """Return an exponential back-off with jitter, so that jobs that failed together are not retried together."""
        longest = min(_MAX_BACK_OFF_S, self._config.back_off_s * 2.0**number)
        return longest * random.uniform(0.5, 1)  # noqa: S311 - no secret

    def _release(self, line: _Line) -> None:
        line.num_running -= 1
        self._enqueue(line)
        self._changed.notify()

    def _enqueue(self, line: _Line) -> None:
        if not line.waiting or line.num_running >= line.most_at_once:
            return
        due_at = min(line.due_at(), self._deadline)  # at the deadline, it is given up
        if line.queued_for is None or due_at < line.queued_for:
            line.queued_for = due_at
            heappush(self._queue, (due_at, next(self._number), line))


def host_of(url: str) -> str:
    """Return the host of a URL, with the port unless it is 80 or 443; empty if the URL has no web host."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return ""
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        return ""
    return parts.hostname if port in (None, 80, 443) else f"{parts.hostname}:{port}"
