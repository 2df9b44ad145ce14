"""Ray on this machine."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from imagerag.compute import _short_folder, start_ray
from imagerag.settings import Settings


@pytest.mark.parametrize(("length", "expected"), [(4, None), (90, "/tmp/ray")])
def test_rays_sockets_have_short_paths(length: int, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/" + (length - 1) * "t")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    assert _short_folder() == expected


@pytest.mark.engines
@pytest.mark.parametrize(
    "before", ["", "ray.init(address='local', include_dashboard=False); start_ray(settings); ray.shutdown()"]
)
def test_ray_that_was_imported_too_early_is_refused(tmp_path: Path, before: str) -> None:
    """It would be started with a token that it does not know itself, and give up after twenty seconds."""
    script = (
        "import ray; from imagerag.compute import start_ray; from imagerag.settings import Settings\n"
        f"settings = Settings(home={str(tmp_path)!r})\n{before}\nprint('ready')\nstart_ray(settings)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "ready" in run.stdout
    assert "UserError: Ray was imported before imagerag could configure it" in run.stderr


@pytest.mark.engines
@pytest.mark.usefixtures("ray_session")
def test_everything_ray_starts_listens_on_loopback_only(tmp_path: Path) -> None:
    start_ray(Settings(home=tmp_path))  # a job that failed in an earlier test has ended it
    listening = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go
            if "ray" in " ".join(process.cmdline()):
                connections = process.net_connections("tcp")
                listening |= {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
