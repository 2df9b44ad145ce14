"""Pins: who keeps which version of a table, whatever is published since.

A pin is a tag on a version that names its owner: a registered model, a training, or another job that reads it. A
model's pin stays until the model is removed; that of a training or job is renewed while it runs and goes when it is
done. One that fails or is killed leaves its pin to the next try, which has the same name and takes it over; a pin that
was not renewed for as long as its kind may rest is removed by whoever publishes next. Publishing and cleaning up spare
what is pinned. Takedowns drop every pin, because bytes would outlive them, and a reader whose version is gone is told
so by `VersionGoneError`.
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
"""What the labels of pins begin with that rest only for a while; a model's is its own."""
_MAY_REST = {JOB: timedelta(hours=1), TRAINING: timedelta(days=7)}
"""A half-done training can be gone on with after a weekend."""
_PREFIX = "pin-"
_RENEW_EVERY_S = 600.0


def pin(store: Store, version: int, label: str) -> None:
    """Keep `version` for `label`, whatever is published later. What the label kept before is let go.

    Raises:
        VersionGoneError: if there is no such version.
    """
    with store.tags_lock():
        store.dataset(version)
        store.set_tag(_PREFIX + label, version)


def unpin(store: Store, label: str) -> None:
    """Let go what `label` keeps, if it keeps something. The files go when the next version is published."""
    with store.tags_lock():
        store.drop_tag(_PREFIX + label)


def pins(store: Store) -> dict[str, int]:
    """Return the version that each label keeps."""
    tags = store.dataset().tags.list()
    return {name.removeprefix(_PREFIX): int(tag["version"]) for name, tag in tags.items() if name.startswith(_PREFIX)}


@contextmanager
def held(store: Store, version: int, label: str) -> Iterator[None]:
    """Keep `version` while the block runs, and after it if it fails, for the next try.

    Args:
        store: the table.
        version: of it.
        label: begins with `JOB` or `TRAINING`, and is the same at the next try.

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
    """Remove the pins that nobody has renewed for as long as they may rest."""
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
        except VersionGoneError:  # the reader is told when it reads
            return
        except Exception as error:  # noqa: BLE001 - stores have exceptions of their own; it is tried again
            logger.warning("the pin %s of table %s could not be renewed: %s", label, store.name, error)
