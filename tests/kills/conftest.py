"""What drivers that are killed share, so that a kill costs what the driver itself does: one Ray, and all imports."""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil
import pytest

_RAY = """
import sys
from imagerag.compute import start_ray
from imagerag.settings import Settings
start_ray(Settings())
import ray
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
_WORKERS = ("_fetch_shard", "MapWorker", "MapBatches", "TrainWorker")


@dataclass(frozen=True)
class Ray:
    """A Ray that stays while drivers die, as a cluster does."""

    address: str
    process: psutil.Process

    def workers(self) -> list[psutil.Process]:
        """Those that are at work."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            if title.startswith("ray::") and any(name in title for name in _WORKERS):
                found.append(process)
        return found


@pytest.fixture(scope="session")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    folder: Path = tmp_path_factory.mktemp("ray")
    with subprocess.Popen(
        [sys.executable, "-c", _RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        address = process.stdout.readline().strip()
        assert address, "Ray does not start"
        yield Ray(address, psutil.Process(process.pid))
        process.stdin.close()


@pytest.fixture(scope="session")
def drivers(engines_home: Path) -> ForkServerContext:
    """Starts processes that have everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kills.preload"])
    first = context.Process(target=int)  # the imports are no part of the time that a driver takes
    first.start()
    first.join()
    return context
