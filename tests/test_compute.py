"""Ray on this machine."""

import psutil
import pytest


@pytest.mark.engines
@pytest.mark.usefixtures("ray_session")
def test_everything_ray_starts_listens_on_loopback_only() -> None:
    listening = {
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        if "ray" in " ".join(process.cmdline())
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
