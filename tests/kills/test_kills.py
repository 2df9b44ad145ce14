"""Whatever dies in whatever stage: nothing is lost, nothing is there twice, and the same again ends well.

Drivers are forked from one process that has everything imported, and share one Ray, as on a cluster: a kill costs what
the stage itself takes. `make test-kill KILLS=300` kills as often, at moments that `SEED=` says, in all stages; with
`KILLS=0`, each stage is disturbed once in the way that `FEW` names. `make test` has neither, because they take minutes.
"""

import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from imagerag.retrieval.pins import pin
from tests.kills import stages
from tests.kills.conftest import Ray
from tests.kills.stages import OTHER_JOB, STAGES, World, check_left_over, check_readable, facts

pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(3600 * 4),
    pytest.mark.skipif(
        "KILLS" not in os.environ, reason="takes minutes: KILLS=0 for one of each, `make test-kill KILLS=n` for more"
    ),
]

KILLS = int(os.environ.get("KILLS", "0"))
SEED = int(os.environ.get("SEED", "20260212"))
FEW = [("download", "driver"), ("embed", "worker"), ("publish", "second writer"), ("features", "moved home")]
"""Of every way one, where it hurts most."""


@dataclass
class Homes:
    """A home before each stage, and what undisturbed drivers make of it."""

    folder: Path
    world: World
    drivers: ForkServerContext
    seconds: dict[str, float]
    expected: dict[str, dict[str, object]]

    def start(self, stage: str, world: World) -> BaseProcess:
        process = self.drivers.Process(target=stages.run, args=(stage, world), daemon=True)
        process.start()
        return process

    def finish(self, stage: str, world: World) -> None:
        process = self.start(stage, world)
        process.join()
        assert process.exitcode == 0, f"{stage} ended with {process.exitcode}"

    def before(self, stage: str, home: Path) -> World:
        """Return a home of its own in which all stages before this one are done."""
        shutil.copytree(self.folder / stage, home)
        return self.at(home)

    def at(self, home: Path) -> World:
        return replace(self.world, environment=self.world.environment | {"IMAGERAG_HOME": str(home)})


@pytest.fixture(scope="module")
def homes(ray: Ray, drivers: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Homes:
    folder = tmp_path_factory.mktemp("kills")
    stages.write_inputs(folder / "inputs")
    world = World(folder / "inputs", {"IMAGERAG_RAY_ADDRESS": ray.address})
    homes = Homes(folder, world, drivers, {}, {})
    home = folder / "home"
    home.mkdir()
    own = homes.at(home)
    last = list(STAGES) if KILLS else [stage for stage in STAGES if stage in dict(FEW)]
    for stage in STAGES:
        shutil.copytree(home, folder / stage)
        started = time.monotonic()
        homes.finish(stage, own)
        homes.seconds[stage] = time.monotonic() - started
        homes.expected[stage] = facts(own)
        check_left_over(own, stage)
        if stage == "publish":
            pin(own.store, own.store.version, OTHER_JOB)
        if stage == last[-1]:
            break
    return homes


def disturb(
    homes: Homes, ray: Ray, stage: str, way: str, home: Path, moments: random.Random, say: Callable[[str], None]
) -> bool:
    """Disturb a stage at some moment, and have it end well. Returns whether it was disturbed before its end."""
    world = homes.before(stage, home)
    process = homes.start(stage, world)
    second = homes.start(stage, world) if way == "second writer" else None
    moment = moments.uniform(0, homes.seconds[stage])
    process.join(moment)
    happened = process.is_alive()
    if way == "worker":
        workers = []
        while not workers and process.is_alive():
            workers = ray.workers()
            time.sleep(0.02)
        if workers:
            worker = moments.choice(workers)
            say(f"{stage}: killing {worker}")
            worker.kill()
        happened = bool(workers)
        process.join()
    elif way != "second writer" or moments.random() < 0.5:
        process.kill()
    process.join()
    if second is not None:
        second.join()
        assert second.exitcode == 0, "the second writer takes over what the first had locked"
    check_readable(world)
    if way == "moved home":
        world = homes.at(home.rename(home.with_name(f"{home.name}-moved")))
        check_readable(world)
    homes.finish(stage, world)
    check_readable(world)
    assert facts(world) == homes.expected[stage], f"{stage}, {way}, after {moment:.2f} s"
    check_left_over(world, stage)
    return happened


@pytest.mark.skipif(KILLS > 0, reason="`make test-kill` does more")
@pytest.mark.parametrize(("stage", "way"), FEW)
def test_what_dies_is_done_when_it_is_run_again(homes: Homes, ray: Ray, tmp_path: Path, stage: str, way: str) -> None:
    disturb(homes, ray, stage, way, tmp_path / "home", random.Random(f"{SEED} {stage} {way}"), print)


@pytest.mark.skipif(KILLS == 0, reason="for `make test-kill KILLS=n`")
def test_random_kills(homes: Homes, ray: Ray, tmp_path: Path) -> None:
    moments, done = random.Random(SEED), {}
    ways = ("driver", "worker", "second writer", "moved home")
    for number in range(KILLS):
        stage, way = moments.choice(list(STAGES)), moments.choice(ways)
        home = tmp_path / str(number)
        try:
            happened = disturb(homes, ray, stage, way, home, moments, print)
        except AssertionError as error:
            pytest.fail(f"kill {number} of seed {SEED}, {stage}, {way}, home {home}: {error}")
        done[stage, way] = done.get((stage, way), 0) + happened
        print(number, stage, way, "disturbed" if happened else "was done before", flush=True)
        for each in (home, home.with_name(f"{home.name}-moved")):
            shutil.rmtree(each, ignore_errors=True)
    print(f"{sum(done.values())} of {KILLS} before the stage's end: {done}")
