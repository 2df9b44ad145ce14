"""Pins: tags that keep a version of a table for what was made of it, such as a registered model.

The files of a pinned version outlive later publications. A takedown drops all pins, because bytes would outlive it too.
"""

from imagerag.errors import UserError
from imagerag.retrieval.publish import published_version
from imagerag.retrieval.store import Store

_PREFIX = "pin-"


def pin(store: Store, version: int, label: str) -> None:
    """Keep `version` for `label`, whatever is published later. What the label kept before is let go.

    Raises:
        UserError: if the version is gone.
    """
    with store.writer_lock():
        require_version(store, version)
        tags = store.dataset().tags
        if label in pins(store):
            tags.update(_PREFIX + label, version)
        else:
            tags.create(_PREFIX + label, version)


def unpin(store: Store, label: str) -> None:
    """Let go what `label` keeps, if it keeps something. The files go when the next version is published."""
    with store.writer_lock():
        if label in pins(store):
            store.dataset().tags.delete(_PREFIX + label)


def pins(store: Store) -> dict[str, int]:
    """Return the version that each label keeps."""
    tags = store.dataset().tags.list()
    return {name.removeprefix(_PREFIX): int(tag["version"]) for name, tag in tags.items() if name.startswith(_PREFIX)}


def require_version(store: Store, version: int) -> None:
    """Make sure that what needs `version` of the table gets it.

    Raises:
        UserError: if the table can't be reached, or has no such version; the message names the published one.
    """
    try:
        if store.has(version):
            return
        now = published_version(store) if store.exists else None
        there = "there is no such table" if now is None else f"version {now} is published now"
    except OSError as error:
        there = f"it can't be reached ({error})"
    raise UserError(
        f"version {version} of the index {store.name!r} in {store.uri}, which the model pins, is not to be had: "
        f"{there}. Bring that index back; or register the model again, on the index as it is now, or portable, with a "
        "copy of the index in it, for machines that can't reach it"
    )
