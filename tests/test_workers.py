"""What all Ray Data jobs share."""

import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from imagerag.compute import start_ray, stop_ray
from imagerag.errors import UserError
from imagerag.settings import Settings
from imagerag.workers import StalledError, WorkersConfig, mapped, plan_workers, watched


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


class Slow:
    """A worker whose parts take a while."""

    def __init__(self, **_: object) -> None:
        pass

    def __call__(self, rows: pa.Table) -> pa.Table:
        time.sleep(0.3)
        return rows


@pytest.mark.engines
@pytest.mark.usefixtures("ray_session")
def test_ray_can_be_stopped_under_a_job_and_started_again(tmp_path: Path) -> None:
    """Ray exits the process where a thread still uses it after its end."""
    parts = [pa.table({"number": [number]}) for number in range(12)]
    settings = Settings(home=tmp_path)
    start_ray(settings)  # a job that failed may have ended it
    with closing(watched(partial(mapped, parts, Slow, {}, WorkersConfig()), 60)) as results:
        assert "number" in next(results)
    stop_ray()
    start_ray(settings)
    rows = list(watched(partial(mapped, parts, Slow, {}, WorkersConfig()), 60))
    assert sorted(row["number"] for row in rows) == list(range(12))
