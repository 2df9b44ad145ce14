"""`imagerag submit`: what is stopped while a job begins. With a real Ray it is tested in `tests/cluster`."""

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from imagerag.cli.submit import _run


class Jobs:
    """Ray's Jobs API, as it is in the moment when a cancelled flow run's signal comes."""

    def __init__(self, signal_at: str) -> None:
        self._signal_at = signal_at
        self.running: set[str] = set()
        self.coming: set[str] = set()
        """Asked for, and listed only later: Ray goes on with a request that its client gave up."""

    def list_jobs(self) -> list[SimpleNamespace]:
        self._reach("list")
        return [SimpleNamespace(submission_id=name) for name in self.running]

    def submit_job(self, *, submission_id: str, **_: object) -> str:
        self.coming.add(submission_id)
        self._reach("submit")
        self.running.add(submission_id)
        self.coming.clear()
        return submission_id

    def stop_job(self, name: str) -> None:
        self.running.remove(name)

    def get_job_status(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(is_terminal=lambda: name not in self.running)

    def _reach(self, moment: str) -> None:
        if moment == self._signal_at:
            self._signal_at = ""
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("moment", ["list", "submit"])
@pytest.mark.parametrize("job_id", ["run-1", None])
def test_a_signal_while_a_job_begins_leaves_none(moment: str, job_id: str | None) -> None:
    jobs = Jobs(moment)
    assert _run(jobs, ["sleep", "600"], job_id) == 130  # type: ignore[arg-type]
    assert jobs.running | jobs.coming == set()
