"""Kill -9 at random moments of an ingest, each followed by a rerun: the table ends as if nothing had happened.

As the other tests here, it takes minutes, and `make test` leaves it to `make test-kill`.
"""

import json
import os
import random
import shutil
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pyarrow as pa
import pytest

from imagerag.embedded.sample.server import SampleServer, write_url_list
from imagerag.retrieval.publish import status
from imagerag.retrieval.store import Store
from tests.kills.conftest import Ray

KILLS = 3
SEED = 20260212
NAME = "kill"
# Small shards and commits, so that there are many moments to be killed between.
PARAMETERS = {
    "download": {
        "allowed_hosts": ["127.0.0.1"],
        "image_format": "webp",
        "shard_size": 25,
        "timeout_s": 1,
        "retries": 1,
    },
    "embed": {"batch_size": 32, "commit_every_s": 0},
}


def _ingest(arguments: list[str], environment: dict[str, str], out: Path) -> None:
    """Run the command in this process."""
    from imagerag.cli import app

    os.environ.update(environment)
    with out.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    app(["ingest", *arguments])


class Driver:
    """Starts ingests, and kills them."""

    def __init__(self, drivers: ForkServerContext, url_list: Path, **settings: str) -> None:
        self._drivers, self._url_list, self._settings = drivers, url_list, settings

    def run(self, home: Path, kill_after_s: float | None) -> tuple[bool, float]:
        """Run an ingest; kill it so long after its flow began. Returns whether it was, and how long the flow took."""
        parameters, out = home.with_suffix(".json"), home.with_suffix(".out")
        parameters.write_text(json.dumps(PARAMETERS))
        arguments = [str(self._url_list), "--name", NAME, "--parameters", str(parameters)]
        environment = {"IMAGERAG_HOME": str(home), **self._settings}
        out.unlink(missing_ok=True)
        process = self._drivers.Process(target=_ingest, args=(arguments, environment, out))
        process.start()
        while process.is_alive() and not (out.exists() and b"Beginning flow run" in out.read_bytes()):
            time.sleep(0.01)
        began = time.monotonic()
        process.join(kill_after_s)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode in (0, -9), out.read_text()
        return process.exitcode == -9, time.monotonic() - began


def _content(home: Path) -> pa.Table:
    """Everything that the published version holds, in the order of the ids."""
    store = Store(str(home / "index"), NAME)
    version = status(store).published_version
    assert version is not None
    return store.dataset(version).to_table().sort_by("id")


@pytest.mark.engines
@pytest.mark.timeout(1200)
@pytest.mark.skipif("KILLS" not in os.environ, reason="takes minutes: for `make test-kill`")
def test_kills_leave_the_table_identical(
    tmp_path: Path, prefect_api_url: str, ray: Ray, drivers: ForkServerContext
) -> None:
    moments = random.Random(SEED)
    with SampleServer() as server:
        url_list = write_url_list(server, tmp_path, limit=200)
        driver = Driver(drivers, url_list, IMAGERAG_PREFECT_API_URL=prefect_api_url, IMAGERAG_RAY_ADDRESS=ray.address)
        killed, duration_s = driver.run(tmp_path / "undisturbed", kill_after_s=None)
        assert not killed
        expected = _content(tmp_path / "undisturbed")
        assert expected.num_rows > 150

        kills = completions = 0
        home = tmp_path / "disturbed"
        while kills < KILLS or completions == 0:
            moment = moments.uniform(0, duration_s) if kills < KILLS else None
            killed, _ = driver.run(home, kill_after_s=moment)
            kills += killed
            if not killed:
                completions += 1
                assert _content(home).equals(expected), f"the table differs after {kills} kills"
                if kills < KILLS:
                    shutil.rmtree(home)
                    completions = 0
