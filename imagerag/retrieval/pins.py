"""Pins: keep a version of a table for a model, a training or a job, whatever is published since.

A pin is a tag on a version that names its owner: a registered model, a training, or another job that reads it. A
model's pin stays until the model is removed. The pin of a training or job is renewed while it runs and removed when it
finishes. If it fails or is killed, the pin stays for the next attempt, which has the same name and takes it over. A pin
that was not renewed within the time limit of its kind is removed by the next publication. Publishing and cleaning up
keep pinned versions. A takedown drops every pin, because pinned versions would keep the bytes that it removes; readers
of such a version get a `VersionGoneError`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from threading import Event, Thread

from imagerag.errors import VersionGoneError
from imagerag.retrieval.store import Store

logger = logging.getLogger(__name__)

JOB, TRAINING = "job-", "training-"
"""Prefixes of the labels of pins that expire; a model's label has neither."""
_MAY_REST = {JOB: timedelta(hours=1), TRAINING: timedelta(days=7)}
"""Time without renewal after which a pin expires. An unfinished training can be continued after a weekend."""
_PREFIX = "pin-"
_RENEW_EVERY_S = 600.0


def pin(store: Store, version: int, label: str) -> None:
    """Keep `version` for `label`, whatever is published later. A version that the label kept before is released.

    Raises:
        VersionGoneError: if there is no such version.
    """
    with store.tags_lock():
        store.dataset(version)
        store.set_tag(_PREFIX + label, version)


def unpin(store: Store, label: str) -> None:
    """Release the version that `label` keeps, if any. Its files are deleted when the next version is published."""
    with store.tags_lock():
        store.drop_tag(_PREFIX + label)


def pins(store: Store) -> dict[str, int]:
    """Return the version that each label keeps."""
    tags = store.dataset().tags.list()
    return {name.removeprefix(_PREFIX): int(tag["version"]) for name, tag in tags.items() if name.startswith(_PREFIX)}


@contextmanager
def held(store: Store, version: int, label: str) -> Iterator[None]:
    """Keep `version` while the block runs; if the block fails, keep it for the next attempt.

    Args:
        store: the table.
        version: a version of the table.
        label: begins with `JOB` or `TRAINING`, and is the same in the next attempt.

    Raises:
        VersionGoneError: if there is no such version.
    """
    assert label.startswith(tuple(_MAY_REST)), label
    pin(store, version, label)
    done = Event()
    renewing = Thread(target=_renew, args=(store, version, label, done), name=label, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
    unpin(store, label)


def drop_resting(store: Store) -> None:
    """Remove the pins that were not renewed within their time limit."""
    with store.tags_lock():
        tags = store.dataset().tags
        now = datetime.now(UTC)
        for name, tag in tags.list().items():
            label = name.removeprefix(_PREFIX)
            may_rest = next((time for kind, time in _MAY_REST.items() if label.startswith(kind)), None)
            if name.startswith(_PREFIX) and may_rest is not None and now - tag["updated_at"] > may_rest:
                logger.info("nothing was heard of %s since %s: its pin is removed", label, tag["updated_at"])
                store.drop_tag(name)


def _renew(store: Store, version: int, label: str, done: Event) -> None:
    while not done.wait(_RENEW_EVERY_S):
        try:
            with store.tags_lock():
                store.dataset(version).tags.update(_PREFIX + label, version)
        except VersionGoneError:  # the reader gets this error when it reads
            return
        except Exception as error:  # noqa: BLE001 - stores raise their own exceptions; it is retried
            logger.warning("the pin %s of table %s could not be renewed: %s", label, store.name, error)
