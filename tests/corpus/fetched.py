"""A case of a download: one URL, what is behind it, and what has to come of it."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image

from imagerag.corpus.shards import PLAN_SCHEMA
from tests.corpus.web import Web

IMAGE_SIZE = 256
MAX_PIXELS = 640 * 400
MAX_BYTES = 400_000


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """One URL, what is behind it, and what a download has to make of it."""

    what: str
    file: Callable[[], bytes] | None = None
    """What is served, without anything special."""
    serve: Callable[[Web, str], str] | None = None
    """Prepares the site's answer at a path, and returns the URL of the list."""
    outcome: str = "success"
    """Or the reason of the failure."""
    detail: str = ""
    """What the message of a failure says beside the reason."""
    size: tuple[int, int] | None = None
    """Of the stored picture."""
    seen: Callable[[], Image.Image] | None = None
    """What people see of it, at any size."""
    within: float = 4
    """Levels that the stored picture may differ from that, on average, after a lossy format."""
    is_kept: bool | None = None
    """Whether the file is stored byte for byte."""


def planned(rows: pa.Table) -> pa.Table:
    """The rows of a list as a shard's plan has them."""
    return pa.Table.from_pylist(rows.rename_columns({"sha256": "expected_sha256"}).to_pylist(), PLAN_SCHEMA)
