"""Ray on this machine."""

from contextlib import suppress

import psutil
import pytest


@pytest.mark.engines
@pytest.mark.usefixtures("ray_session")
def test_everything_ray_starts_listens_on_loopback_only() -> None:
    listening = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go
            if "ray" in " ".join(process.cmdline()):
                connections = process.net_connections("tcp")
                listening |= {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
