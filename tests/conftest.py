"""Engines that are started once for the whole session."""

import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Before torch is first imported: tests run two at a time, and threads that wait for each other's core only burn it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Ray's workers have more threads

import pytest

from imagerag.compute import ray_environment
from imagerag.services import prefect_environment
from imagerag.settings import Settings

FLOWS = (
    "flows/test_pipeline.py",
    "end_to_end/test_deployments.py",
    "flows/test_ingest.py",
    "flows/test_evaluate.py",
    "flows/test_folder.py",
    "flows/test_finetune.py",
    "flows/test_runs.py",
)
"""Files with tests of flows: of several processes, one runs all of them, so that one starts Prefect."""
RAY = (
    "training/test_finetune.py",
    "corpus/test_download.py",
    "corpus/test_folder.py",
    "embedding/test_embed.py",
    "test_workers.py",
    "test_compute.py",
)
"""The other files that need Ray, which are together, too."""
LONGEST = (
    *FLOWS,
    *RAY,
    "recipes/test_adapters.py",
    "registry/test_serving.py",
    "end_to_end/test_services.py",
    "retrieval/test_quality.py",
    "retrieval/test_index.py",
    "recipes/test_tiny_base.py",
    "security/test_servers.py",
    "training/test_tracking.py",
    "cli/test_compare.py",
    "training/test_trainer.py",
    "evaluation/test_metrics.py",
    "registry/test_versions.py",
    "generation/test_diffusers_calls.py",
    "training/test_synthesize.py",
    "evaluation/test_evaluate.py",
    "embedded/test_tiny_base.py",
    "training/test_formats.py",
    "training/test_plan.py",
)
"""Files that take half a minute or more. Begun last, one of them would run alone at the end."""


def pytest_configure() -> None:
    """Set what Ray reads when it is first imported, which img2dataset does, where a test module imports that."""
    os.environ.update(ray_environment(local=True))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for garbage among what tests make, not among what their modules import: millions of objects, which stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the longest files first; the others stay in their order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(_file(item), len(LONGEST)))


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).as_posix()


def _group(file: str) -> str | None:
    """Name what a file shares an engine with."""
    return "flows" if file in FLOWS else "ray" if file in RAY else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out tests by file, as `loadfile` does, and the files that share an engine together."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return _group(file.removeprefix("tests/")) or file

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End Ray after the last file that shares it: idle, it takes 3 seconds of CPU a minute."""
    is_last = _group(_file(item)) is not None and (nextitem is None or _group(_file(nextitem)) is None)
    if is_last and (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """What a test, or a command that it runs in its process, sets of the environment and the folder ends with it."""
    environment, folder = dict(os.environ), Path.cwd()
    yield
    os.chdir(folder)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture(scope="session", autouse=True)
def engines_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home for the engines of this session; set before Prefect is first imported, which reads it then."""
    home = tmp_path_factory.mktemp("engines")
    os.environ.update(prefect_environment(Settings(home=home)))
    return home


@pytest.fixture(scope="session")
def ray_session(engines_home: Path) -> Iterator[None]:
    """Ray on this machine, shared by every test that needs it."""
    from imagerag.compute import start_ray

    start_ray(Settings(home=engines_home))
    import ray

    yield
    ray.shutdown()


@pytest.fixture
def jobs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data jobs run in this process: see `tests/jobs.py`. That they run on Ray is in the tests of the pipeline."""
    from tests.jobs import use_jobs_here

    use_jobs_here(monkeypatch)


@pytest.fixture(scope="session")
def prefect_api_url(engines_home: Path) -> Iterator[str]:
    """A Prefect server, shared by every test that runs a flow."""
    from imagerag.cli.run import prefect_session

    with prefect_session(Settings(home=engines_home)) as api_url:
        yield api_url
