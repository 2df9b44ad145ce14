"""What all Ray Data jobs share."""

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from imagerag.errors import UserError
from imagerag.settings import Settings
from imagerag.workers import Dtype, Job, StalledError, WorkersConfig, follow, plan_workers, run_job, watched


@pytest.mark.parametrize(
    ("nodes", "config", "expected"),
    [
        ([{"CPU": 2}], {}, ("cpu", 1, 2)),
        ([{"CPU": 2}], {"num_workers": 2}, ("cpu", 2, 1)),
        ([{"CPU": 1}], {}, ("cpu", 1, 1)),
        ([{}, {"CPU": 16}, {"CPU": 16}], {}, ("cpu", 4, 8)),
        ([{"CPU": 4}] * 3, {}, ("cpu", 3, 4)),
        ([{"CPU": 16, "GPU": 2}], {}, ("cuda", 2, 8)),
        ([{"CPU": 16, "GPU": 2}], {"device": "cpu"}, ("cpu", 2, 8)),
    ],
)
def test_workers_suit_the_machines(nodes: list[Any], config: dict[str, Any], expected: tuple[str, int, int]) -> None:
    listed = [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {"CPU": 3}}]
    assert plan_workers(listed, WorkersConfig(**config)) == expected


def test_more_workers_than_the_machines_have_are_refused() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2}}]
    with pytest.raises(UserError, match="needs a core of its own: Ray has 2, and 3 workers are asked for"):
        plan_workers(nodes, WorkersConfig(num_workers=3))
    with pytest.raises(UserError, match="needs a GPU of its own: Ray has 0, and 1 workers are asked for"):
        plan_workers(nodes, WorkersConfig(device="cuda"))


def test_a_stall_is_an_error() -> None:
    def results() -> Iterator[int]:
        yield 1
        time.sleep(30)

    iterator = watched(results, timeout_s=0.2)
    assert next(iterator) == 1
    with pytest.raises(StalledError, match=r"no batch was finished for 0 s.*run the same again to continue"):
        next(iterator)


def test_a_watched_error_is_raised() -> None:
    def results() -> Iterator[int]:
        yield 1
        raise KeyError("fault")

    with pytest.raises(KeyError, match="fault"):
        list(watched(results, timeout_s=5))


def job_of(results: Sequence[Sequence[str]], **changes: Any) -> tuple[Job, list[list[str]], list[int]]:
    """A job with a row for each thing that is written, what it commits, and the numbers of rows that it reports."""
    committed: list[list[str]] = []
    done: list[int] = []
    job = Job(
        parts=[], worker=Slow, arguments={}, num_rows=sum(map(len, results)), commit=committed.append,
        on_done=done.append,
    )  # fmt: skip
    return replace(job, **changes), committed, done


def run_here(job: Job, results: Sequence[Sequence[str]]) -> float:
    rows = [{"written": written, "num_rows": len(written), "machine_s": 0.5} for written in results]
    return follow(job, lambda: rows, timeout_s=5)


WRITTEN = [["a", "b"], [], ["c"], ["d", "e"]]


@pytest.mark.parametrize(
    ("every_s", "expected"), [(0.0, [["a", "b"], ["c"], ["d", "e"]]), (3600.0, [["a", "b", "c", "d", "e"]])]
)
def test_results_are_committed_in_groups(every_s: float, expected: list[list[str]]) -> None:
    job, committed, done = job_of(WRITTEN, commit_every_s=every_s)
    assert run_here(job, WRITTEN) == 2.0
    assert committed == expected
    assert done == [2, 2, 3, 5]


def test_a_wrong_number_of_rows_is_an_error() -> None:
    job, _, _ = job_of(WRITTEN, num_rows=6)
    with pytest.raises(AssertionError, match="5 rows were done instead of 6"):
        run_here(job, WRITTEN)


def test_nothing_is_reported_before_it_is_committed() -> None:
    job, committed, done = job_of(WRITTEN)

    def fail(written: list[str]) -> None:
        if committed:
            raise KeyError(*written)
        committed.append(written)

    with pytest.raises(KeyError, match="c"):
        run_here(replace(job, commit=fail), WRITTEN)
    assert (committed, done) == ([["a", "b"]], [2, 2])


class Slow:
    """A worker whose parts take a while; `broken` is the number of a part that it fails on."""

    def __init__(self, *, broken: int = -1, device: str, dtype: Dtype | None) -> None:
        self._broken = broken

    def __call__(self, rows: pa.Table) -> tuple[list[str], int]:
        time.sleep(0.3)
        numbers = rows["number"].to_pylist()
        if self._broken in numbers:
            raise KeyError("broken")
        return list(map(str, numbers)), len(numbers)


@pytest.mark.engines
@pytest.mark.usefixtures("ray_session")
def test_a_failed_job_stops_ray_and_the_next_starts_it_again(tmp_path: Path) -> None:
    """Ray exits the process where a thread still uses it after its end."""
    import ray

    parts = [pa.table({"number": [number]}) for number in range(12)]
    job, committed, _ = job_of([[""]] * 12, parts=parts)
    config, settings = WorkersConfig(), Settings(home=tmp_path)

    def fail(_: int) -> None:
        raise RuntimeError("of the driver")

    with pytest.raises(RuntimeError, match="of the driver"):
        run_job(replace(job, on_done=fail), config, settings)
    assert not ray.is_initialized()
    committed.clear()
    assert run_job(job, config, settings) >= 12 * 0.3
    assert sorted(int(number) for (number,) in committed) == list(range(12))
    for broken in ({"arguments": {"broken": 5}}, {"read": broken_part}):
        with pytest.raises(KeyError, match="broken"):
            run_job(replace(job, **broken), config, settings)
        assert not ray.is_initialized()


def whole_part(part: pa.Table) -> Iterator[pa.Table]:
    yield part


@pytest.mark.engines
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("read", [None, whole_part])
def test_parts_are_in_rays_memory_and_not_in_the_drivers(
    tmp_path: Path, read: Callable[[pa.Table], Iterator[pa.Table]] | None
) -> None:
    made: list[weakref.ref[pa.Table]] = []
    num_alive = []

    def parts() -> Iterator[pa.Table]:
        for number in range(12):
            num_alive.append(sum(each() is not None for each in made))
            part = pa.table({"number": [number]})
            made.append(weakref.ref(part))
            yield part

    job, committed, _ = job_of([[""]] * 12, parts=parts(), worker=Quick, read=read)
    run_job(job, WorkersConfig(), Settings(home=tmp_path))
    assert sorted(int(number) for (number,) in committed) == list(range(12))
    assert max(num_alive) == 1, "the last one"


class Quick:
    """A worker that does nothing."""

    def __init__(self, *, device: str, dtype: Dtype | None) -> None:
        pass

    def __call__(self, rows: pa.Table) -> tuple[list[str], int]:
        return list(map(str, rows["number"].to_pylist())), len(rows)


def broken_part(part: pa.Table) -> Iterator[pa.Table]:
    yield part
    raise KeyError("broken")
