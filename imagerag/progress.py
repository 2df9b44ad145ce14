"""The progress callback of long jobs, implemented by terminals, Prefect artifacts and tests."""

from typing import Protocol


class OnProgress(Protocol):
    """Progress callback, called from the job's thread after every unit of work."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` units are finished; `note` describes the last ones."""


def silent(done: int, total: int, note: str = "") -> None:
    """Ignore progress."""


def duration(seconds: float) -> str:
    """Return a time for progress notes, in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
