"""The queue of hosts, against servers of several kinds on a clock that costs no time, and with threads."""

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

import pytest

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.guard import FetchError, Reason
from imagerag.corpus.hosts import Hosts, Job, Pace, Queue, host_of

RATE = 100.0
Server = Callable[[float], FetchError | None]
"""Says at a time why it brings nothing then, if it doesn't."""


def busy(wait_s: float | None = None) -> FetchError:
    return FetchError(Reason.SERVER_BUSY, "429", wait_s)


@dataclass
class Window:
    """Takes so many URLs in any second."""

    taken: deque[float] = field(default_factory=deque)

    def __call__(self, now: float) -> FetchError | None:
        while self.taken and self.taken[0] <= now - 1:
            self.taken.popleft()
        if len(self.taken) >= RATE:
            return busy(math.ceil(self.taken[0] + 1 - now))
        self.taken.append(now)
        return None


@dataclass
class Bucket:
    """Takes some URLs at once, and as many a second as it is filled again; doesn't say when to come back."""

    level: float = RATE / 5
    at: float = 0.0

    def __call__(self, now: float) -> FetchError | None:
        self.level, self.at = min(RATE / 5, self.level + RATE * (now - self.at)), now
        if self.level < 1:
            return busy()
        self.level -= 1
        return None


class Simulation:
    """Workers that fetch shards from servers, each of which answers after a while."""

    def __init__(
        self,
        config: DownloadConfig | None = None,
        num_workers: int = 1,
        latency_s: float = 0.01,
        late_s: float = 0.0,
    ) -> None:
        """`late_s` is when all workers but the first start."""
        random.seed(0)
        self._late_s = late_s
        self.now = 0.0
        self.outcomes: Counter[str] = Counter()
        self.asked: list[tuple[float, str]] = []
        self.refused: list[tuple[float, FetchError]] = []
        self.most_at_once = 0
        self._latency_s = latency_s
        self._hosts = [Hosts(config or DownloadConfig(), num_workers, lambda: self.now) for _ in range(num_workers)]
        self._order = itertools.count()

    def run(self, servers: dict[str, Server], urls: list[str], shard_size: int = 10**6) -> float:
        """Fetch all `urls`; returns how long it took."""
        begun = self.now
        todo = [urls[start : start + shard_size] for start in range(0, len(urls), shard_size)]
        queues: list[tuple[Queue, list[int]]] = []
        free = list(self._hosts)
        answers: list[tuple[float, int, int, Job, FetchError | None]] = []
        while True:
            while todo and free and (not queues or self.now >= self._late_s):
                shard = todo.pop(0)
                queues.append((Queue(shard, free.pop()), [len(shard)]))
            later = [
                self._hand_out(number, queue, left, servers, answers) for number, (queue, left) in enumerate(queues)
            ]
            if answers:
                later.append(answers[0][0])
            for queue, left in queues:
                if left[0] == 0:
                    left[0] = -1
                    free.append(queue._hosts)
            if all(left[0] < 0 for _, left in queues) and not todo:
                return self.now - begun
            if todo and free:
                if self.now >= self._late_s:
                    continue
                later.append(self._late_s)
            self.now = max(self.now, min(later))
            while answers and answers[0][0] <= self.now:
                _, _, number, job, error = heapq.heappop(answers)
                queue, left = queues[number]
                if error is None:
                    queue.succeeded(job)
                elif queue.failed(job, error):
                    self.refused.append((self.now, error))
                    continue
                left[0] -= 1
                self.outcomes["success" if error is None else error.reason] += 1

    def _hand_out(
        self,
        number: int,
        queue: Queue,
        left: list[int],
        servers: dict[str, Server],
        answers: list[tuple[float, int, int, Job, FetchError | None]],
    ) -> float:
        while left[0] > 0 and isinstance(job := queue.poll(self.now), Job):
            if job.error is not None:
                left[0] -= 1
                self.outcomes[job.error.reason] += 1
                continue
            name = job.line.host.name
            self.asked.append((self.now, name))
            latency_s = self._latency_s * random.uniform(0.8, 1.6)
            error = servers[name](self.now)
            heapq.heappush(answers, (self.now + latency_s, next(self._order), number, job, error))
            self.most_at_once = max(self.most_at_once, len(answers))
        return job if left[0] > 0 and isinstance(job, float) else math.inf


@pytest.mark.parametrize(("server", "num_workers"), [(Window, 1), (Window, 2), (Bucket, 1), (Bucket, 2)])
def test_a_server_with_a_limit_is_used_up_to_it(server: Callable[[], Server], num_workers: int) -> None:
    simulation = Simulation(num_workers=num_workers)
    num_urls = 12_000
    took_s = simulation.run({"a": server()}, ["http://a/"] * num_urls, shard_size=1000)
    assert simulation.outcomes == {"success": num_urls}
    assert took_s < 1.12 * num_urls / RATE
    assert len(simulation.refused) < 0.005 * num_urls


@pytest.mark.parametrize("late_s", [0.2, 0.5, 0.9, 1.5])
def test_a_worker_that_finds_the_limit_used_up_gets_its_share(late_s: float) -> None:
    """Its first request is refused, which does not mean that the host is slow."""
    simulation = Simulation(num_workers=2, late_s=late_s)
    took_s = simulation.run({"a": Window()}, ["http://a/"] * 9_000, shard_size=500)
    assert simulation.outcomes == {"success": 9_000}
    assert took_s < 1.2 * 9_000 / RATE


def test_retry_after_is_respected() -> None:
    simulation = Simulation()
    simulation.run({"a": Window()}, ["http://a/"] * 2000)
    for refused_at, error in simulation.refused:
        assert error.wait_s is not None
        assert not [at for at, _ in simulation.asked if refused_at < at < refused_at + error.wait_s - 1e-6]


def test_a_rate_that_was_cut_grows_again_from_the_end_of_the_pause() -> None:
    pace = Pace(math.inf, 0.0)
    for number in range(10):
        pace.taken(0.1 + number / 10)
    pace.refused(1.0, resume_at=31.0)
    assert pace.next_at == 31.0
    assert pace.rate(31.0) == pace.rate(1.0) == pytest.approx(9.7)
    assert pace.rate(71.0) == pytest.approx(2 * 9.7)


def test_other_hosts_go_on_meanwhile() -> None:
    simulation = Simulation()
    urls = [f"http://{name}/{number}" for number in range(100) for name in ("slow", "fast")]
    simulation.run({"slow": lambda now: busy(30) if now < 20 else None, "fast": lambda _: None}, urls)
    assert simulation.outcomes == {"success": 200}
    assert max(at for at, name in simulation.asked if name == "fast") < 1
    assert min(at for at, name in simulation.asked if name == "slow" and at > 1) >= 30


@pytest.mark.parametrize("answers_until", [-1.0, 0.0], ids=["never answered", "answered"])
@pytest.mark.parametrize("reason", [Reason.TIMEOUT, Reason.CONNECTION_FAILED, Reason.DNS_FAILURE])
def test_a_host_that_is_down_is_set_aside_for_the_run(reason: Reason, answers_until: float) -> None:
    simulation = Simulation(DownloadConfig(retries=1, max_host_failures=5))
    servers: dict[str, Server] = {
        "down": lambda now: FetchError(reason, "no") if now > answers_until else None,
        "up": lambda _: None,
    }
    urls = [f"http://{name}/{number}" for number in range(500) for name in ("down", "up")]
    simulation.run(servers, urls, shard_size=500)
    num_answered = sum(name == "down" and at <= answers_until for at, name in simulation.asked)
    assert simulation.outcomes["success"] == 500 + num_answered
    assert simulation.outcomes[reason] + simulation.outcomes[Reason.HOST_DOWN] == 500 - num_answered
    num_asked = sum(name == "down" for _, name in simulation.asked)
    assert num_asked < 60, "the second shard knows it from the first"
    assert simulation.now < 60


def test_some_failures_are_no_host_that_is_down() -> None:
    simulation = Simulation(DownloadConfig(retries=1))
    fails = itertools.cycle([True, True, False])
    simulation.run({"a": lambda _: FetchError(Reason.TIMEOUT, "no") if next(fails) else None}, ["http://a/"] * 600)
    assert simulation.outcomes[Reason.HOST_DOWN] == 0
    assert simulation.outcomes["success"] > 200


def test_a_url_that_is_always_refused_is_no_host_that_is_down() -> None:
    simulation, number = Simulation(), itertools.count()
    urls = [f"http://a/{number}" for number in range(300)]
    servers: dict[str, Server] = {"a": lambda _: busy() if next(number) in refused else None}
    refused: range | set[int] = {50, *range(300, 400)}  # what is asked for last are those that were refused
    simulation.run(servers, urls)
    assert simulation.outcomes == {"success": 299, Reason.SERVER_BUSY: 1}
    refused = set()
    simulation.run(servers, urls)
    assert simulation.outcomes["success"] == 599


def test_who_asks_to_wait_for_too_long_is_not_waited_for() -> None:
    simulation = Simulation(DownloadConfig(max_wait_s=60))
    simulation.run({"a": lambda _: busy(3600)}, ["http://a/"] * 50)
    assert simulation.outcomes == {Reason.HOST_DOWN: 50}
    assert simulation.now < 1


def test_waiting_has_an_end() -> None:
    simulation, taken = Simulation(DownloadConfig(max_wait_s=10)), [-math.inf]

    def slow(now: float) -> FetchError | None:
        if now < taken[-1] + 2.5:
            return busy()
        taken.append(now)
        return None

    simulation.run({"a": slow}, ["http://a/"] * 100)
    assert simulation.outcomes.keys() == {"success", Reason.SERVER_BUSY}
    assert sum(simulation.outcomes.values()) == 100
    assert 20 < simulation.outcomes["success"] < 45
    assert max(at for at, _ in simulation.asked) <= 10 + 100


def test_limits_hold_for_all_workers_together() -> None:
    simulation = Simulation(DownloadConfig(per_host=8, per_host_rate=50), num_workers=4, latency_s=1.0)
    took_s = simulation.run({"a": lambda _: None}, ["http://a/"] * 400, shard_size=100)
    assert simulation.most_at_once == 8
    assert took_s > 400 / 8 * 0.8
    paced = Simulation(DownloadConfig(per_host=1024, per_host_rate=50), num_workers=4)
    assert 0.95 * 8 < paced.run({"a": lambda _: None}, ["http://a/"] * 400, shard_size=100) < 1.1 * 8


def test_a_friendly_host_is_not_remembered() -> None:
    hosts = Hosts(DownloadConfig())
    queue = Queue(["http://a/"], hosts)
    job = queue.take()
    queue.succeeded(job)
    known = hosts["a"]
    hosts.forget_ordinary()
    assert hosts["a"] is not known


def test_a_host_that_failed_once_or_may_not_be_asked_yet_is_remembered() -> None:
    failed, asked = (Hosts(DownloadConfig(per_host_rate=rate), clock=lambda: 0.0) for rate in (None, 1))
    queue = Queue(["http://a/"], failed)
    queue.failed(queue.take(), FetchError(Reason.TIMEOUT, "no"))
    queue = Queue(["http://a/"], asked)
    queue.succeeded(queue.take())
    for hosts in (failed, asked):
        known = hosts["a"]
        hosts.forget_ordinary()
        assert hosts["a"] is known


def test_threads_bring_every_url_to_its_end_once() -> None:
    config = DownloadConfig(per_host=3, back_off_s=0.001, retries=2)
    urls = [f"http://host{number % 7}/{number}" for number in range(700)]
    queue = Queue(urls, Hosts(config))
    fails = itertools.cycle([False, True, False])

    def bring_one(_: str) -> int:
        while True:
            job = queue.take()
            if job.error is not None or not next(fails):
                queue.succeeded(job)
                return job.index
            if not queue.failed(job, FetchError(Reason.SERVER_ERROR, "500")):
                return job.index

    with ThreadPool(queue.most_at_once) as pool:
        assert queue.most_at_once == 21
        assert sorted(pool.imap_unordered(bring_one, urls)) == list(range(700))


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://A.example/x", "a.example"),
        ("https://a.example:443/x", "a.example"),
        ("http://a.example:8080/x", "a.example:8080"),
        ("http://[::1]/", "::1"),
        ("file:///a/b", ""),
        ("http:///x", ""),
        ("http://a:x/", ""),
        ("nonsense", ""),
    ],
)
def test_host_of(url: str, host: str) -> None:
    assert host_of(url) == host
