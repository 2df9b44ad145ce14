"""Kills of what needs no Ray, which cost a second each: publishing, registering and takedowns."""

import os
import random
import shutil
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from imagerag.corpus.corpus import Corpus
from imagerag.retrieval.pins import pin, pins
from imagerag.retrieval.publish import published_version
from imagerag.storage import lance_table
from imagerag.takedown import find, take_down
from tests.evaluation.conftest import make_finetuned
from tests.generation.with_index import drawing
from tests.kills import stages
from tests.kills.stages import NAME, OTHER_JOB, World, check_left_over, check_readable, facts
from tests.retrieval.rows import append, make_rows
from tests.test_takedown import URL, Everything, files_with
from tests.training import conftest as training

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        "KILLS" not in os.environ, reason="takes minutes: KILLS=0 for one of each, `make test-kill KILLS=n` for more"
    ),
]
world_folder = training.world_folder

KILLS = int(os.environ.get("KILLS", "0"))
SEED = int(os.environ.get("SEED", "20260212"))
WAYS = ("driver", "driver twice", "second writer", "moved home")


def _take_down(world: World) -> None:
    settings = world.settings
    take_down(settings, NAME, find(settings, NAME, urls=[URL]))


DRIVERS = {"publish": stages._publish, "register": stages._register, "takedown": _take_down}


def run(stage: str, world: World) -> None:
    """Run a stage, in a process of its own."""
    DRIVERS[stage](world)


class Homes:
    """A home that has everything, what undisturbed drivers make of it, and how long they take."""

    def __init__(self, folder: Path, everything: Everything, drivers: ForkServerContext) -> None:
        self.folder, self.traces, self._drivers = folder, everything.traces, drivers
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[str, object]] = {}
        for stage in DRIVERS:
            world = self.copy(folder.parent / f"undisturbed-{stage}")
            started = time.monotonic()
            self.run(stage, world)
            self.seconds[stage] = time.monotonic() - started
            self.expected[stage] = facts(world)

    def copy(self, to: Path) -> World:
        shutil.copytree(self.folder, to)
        return World(to, {"IMAGERAG_HOME": str(to)})

    def run(self, stage: str, *worlds: World, kill_after_s: float | None = None) -> bool:
        """Start drivers, kill the first of them so long after, and await the others. Returns whether it was."""
        processes = [self._drivers.Process(target=run, args=(stage, world)) for world in worlds]
        for process in processes:
            process.start()
        processes[0].join(kill_after_s)
        processes[0].kill()  # which does nothing if it has ended
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        killed = codes[0] == -signal.SIGKILL
        assert codes == [-signal.SIGKILL if killed else 0] + [0] * (len(processes) - 1), codes
        return killed

    def disturb(self, stage: str, way: str, to: Path, moments: random.Random) -> bool:
        """Disturb a stage, and have it end well. Returns whether that was before its end."""
        world = self.copy(to)
        pinned = pins(world.store)[OTHER_JOB]
        for _ in range(2 if way == "driver twice" else 1):
            worlds = (world, world) if way == "second writer" else (world,)
            killed = self.run(stage, *worlds, kill_after_s=moments.uniform(0, self.seconds[stage]))
            check_readable(world)
        if way == "moved home":
            to = to.rename(to.with_name(f"{to.name}-moved"))
            world = World(to, {"IMAGERAG_HOME": str(to)})
            check_readable(world)
        self.run(stage, world)
        check_readable(world)
        assert facts(world) == self.expected[stage]
        assert published_version(world.store) is not None
        check_left_over(world, stage)
        if stage == "takedown":
            assert files_with(to, *self.traces) == []
            assert pins(world.store) == {}
        else:
            assert pins(world.store)[OTHER_JOB] == pinned
        return killed


@pytest.fixture(scope="module")
def homes(world_folder: Path, tmp_path_factory: pytest.TempPathFactory, drivers: ForkServerContext) -> Homes:
    folder = tmp_path_factory.mktemp("kills") / "home"
    shutil.copytree(world_folder, folder.parent, ignore=shutil.ignore_patterns("training"), dirs_exist_ok=True)
    world = training.World(folder.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance_table, "_FRAGMENT_ROWS", 3)
        patch.setenv("IMAGERAG_HOME", str(folder))
        world.add(10, ["green castle"], [drawing(30)])
        everything = Everything(world, make_finetuned(world, 0, tracked=True))
        pin(world.store, world.store.version, OTHER_JOB)
        append(world.store, make_rows(100, 104, world.store.encoder))
        assert Path(Corpus(world.settings.shards_of(NAME)).shard(0).tar).is_file()
        made = Homes(folder, everything, drivers)
    return made


@pytest.mark.parametrize(("stage", "way"), list(zip(DRIVERS, ("second writer", "driver", "moved home"), strict=True)))
def test_what_dies_is_done_when_it_is_run_again(homes: Homes, tmp_path: Path, stage: str, way: str) -> None:
    homes.disturb(stage, way, tmp_path / "home", random.Random(f"{SEED} {stage}"))


@pytest.mark.timeout(3600 * 4)
@pytest.mark.skipif(KILLS == 0, reason="for `make test-kill KILLS=n`")
def test_random_kills(homes: Homes, tmp_path: Path) -> None:
    moments, done = random.Random(SEED), dict.fromkeys(DRIVERS, 0)
    for number in range(KILLS):
        stage, way = moments.choice(list(DRIVERS)), moments.choice(WAYS)
        home = tmp_path / str(number)
        try:
            done[stage] += homes.disturb(stage, way, home, moments)
        except AssertionError as error:
            pytest.fail(f"kill {number} of seed {SEED}, {stage}, {way}, {home}: {error}")
        print(number, stage, way, done, flush=True)
        for each in (home, home.with_name(f"{home.name}-moved")):
            shutil.rmtree(each, ignore_errors=True)
