"""Progress of a stage, in the Prefect UI and, if there is one, on the terminal."""

import sys
import time
from types import TracebackType
from typing import Self

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from tqdm import tqdm

_SECONDS_BETWEEN_UPDATES = 1.0


class StageProgress:
    """A progress callback (`imagerag.progress.OnProgress`) that updates a Prefect artifact and a terminal bar.

    The artifact is created by the first call, so that a stage with nothing to do has none.
    """

    def __init__(self, stage: str, unit: str) -> None:
        self._stage = stage
        self._unit = unit
        self._artifact_id: object | None = None
        self._next_update = 0.0
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total`; the artifact is updated at most once a second, and at the end."""
        self._show_bar(done, total, note)
        now = time.monotonic()
        if now < self._next_update and done < total:
            return
        self._next_update = now + _SECONDS_BETWEEN_UPDATES
        percent = 100.0 * done / total if total else 100.0
        description = f"{self._stage}: {done:,} of {total:,} {self._unit}{f' ({note})' if note else ''}"
        if self._artifact_id is None:
            self._artifact_id = create_progress_artifact(progress=percent, description=description)
        else:
            update_progress_artifact(artifact_id=self._artifact_id, progress=percent, description=description)  # type: ignore[arg-type]

    def _show_bar(self, done: int, total: int, note: str) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, desc=self._stage, unit=f" {self._unit}", disable=not sys.stderr.isatty())
        self._bar.total = total
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)
