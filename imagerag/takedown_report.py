"""The report of a takedown: the only record of what it removed. It never replaces another report."""

from contextlib import suppress
from datetime import datetime
from itertools import count
from typing import TYPE_CHECKING

from imagerag.artifacts import Sweep
from imagerag.plain import in_markdown
from imagerag.retrieval.takedown import Removal
from imagerag.storage.files import ConflictError, replace_file

if TYPE_CHECKING:
    from imagerag.takedown import Target


def write_report(folder: str, at: datetime, report: str) -> str:
    """Write a report to a new file, named by its time, and return the file's URI."""
    for number in count(1):
        uri = f"{folder}/{at:%Y-%m-%dT%H-%M-%S}{f'-{number}' if number > 1 else ''}.md"
        with suppress(ConflictError):
            replace_file(uri, report.encode(), None)
            break
    return uri


def make_report(
    name: str, now: datetime, target: "Target", num_samples: int, removal: Removal | None, sweep: Sweep
) -> str:
    """Return the report of a takedown in markdown, in which no URL or error message is a link or an image."""
    deleted = [f"{num_samples} images in the shards"]
    if removal is not None:
        deleted.append(
            f"{removal.num_rows} rows of the table with their embeddings and features, in all versions; it is at "
            f"version {removal.version}"
        )
    left = [
        *sweep.left,
        "files in your folders or on your servers that the URLs point to, and backups: not reachable from here",
    ]
    parts = {
        "Asked for": [f"{column} {value}" for column, values in target.asked.items() for value in values],
        "Images (SHA-256)": target.image_sha256s,
        "Their rows": target.ids,
        "Their URLs": target.urls,
        "Deleted": [*deleted, *sweep.deleted],
        "Left for a person to delete": left,
    }
    sections = [
        f"## {title}\n\n" + "\n".join(f"- {in_markdown(each)}" for each in lines) for title, lines in parts.items()
    ]
    return "\n\n".join([f"# Takedown from {name}, {now:%Y-%m-%d %H:%M} UTC", *sections]) + "\n"
