"""How a long job says where it is, whoever listens: a terminal, a Prefect artifact, a test."""

from typing import Protocol


class OnProgress(Protocol):
    """Called from the job's own thread after every unit of work."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` units are finished; `note` says what the last ones were."""


def silent(done: int, total: int, note: str = "") -> None:
    """Listen to nothing."""
