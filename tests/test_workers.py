"""What all Ray Data jobs share."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from imagerag.errors import UserError
from imagerag.workers import StalledError, WorkersConfig, plan_workers, watched


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
