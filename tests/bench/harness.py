"""What the benches share: rows, repetitions, fresh processes and the name of the machine."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, TypeVar

import psutil

Scale = Literal["small", "full"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: a figure of ours, the same figure of a peer, and what their ratio has to be."""

    what: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    at_least: float | None = None
    """The bar where more is better: the smallest ratio that meets it."""
    at_most: float | None = None
    """The bar where less is better: the largest ratio that meets it."""

    @property
    def ratio(self) -> float:
        """Ours as a share of the peer's."""
        return self.ours / self.peer

    @property
    def bar(self) -> str:
        """The condition on the ratio; empty where there is none."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return "" if self.at_most is None else f"≤ {self.at_most:g}"

    @property
    def met(self) -> bool:
        """Whether the ratio, unrounded, meets its bar; true where there is none."""
        return (self.at_least is None or self.ratio >= self.at_least) and (
            self.at_most is None or self.ratio <= self.at_most
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """All rows of one run of a bench."""

    bench: str
    machine: str
    date: str
    rows: tuple[Row, ...]

    def write(self, folder: Path) -> None:
        """Replace the result of the last run."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / f"{self.bench}.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read what `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {"rows": tuple(Row(**row) for row in values["rows"])})


def today() -> str:
    """The date of a result."""
    return datetime.now(UTC).date().isoformat()


def machine() -> str:
    """Name this machine as a table's reader needs it."""
    cpu_info = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1] for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
    memory_gib = psutil.virtual_memory().total / 2**30
    return (
        f"{models[0].strip() if models else platform.machine()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, "
        f"Python {platform.python_version()}, torch {version('torch')}"
    )


def alternate(repetitions: int, *measures: Callable[[], T]) -> list[list[T]]:
    """Run all measures in turn, and again; return each one's values. A machine's drift so falls on all alike."""
    rounds = [[measure() for measure in measures] for _ in range(repetitions)]
    return [list(values) for values in zip(*rounds, strict=True)]


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def in_fresh_process(function: Callable[..., T], *arguments: object) -> tuple[T, float]:
    """Call a module's function in a new interpreter.

    Returns its value and the seconds from the interpreter's start to its end, imports included.
    """
    started = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_keep_stdout_clean) as pool:
        value = pool.submit(function, *arguments).result()
    return value, time.perf_counter() - started


def _keep_stdout_clean() -> None:
    """Send what engines print to stderr: stdout is for the table."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
