"""One shard of a corpus: its plan, and the files that img2dataset writes for it.

    plan/00012.parquet    the URLs of shard 12, written before anything is fetched
    00012.tar             its images, captions and metadata, as webdataset
    00012.parquet         the outcome of each of its URLs
    00012_stats.json      its completion marker, written last

A plan is written once, and a finished shard is never fetched again.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from imagerag.storage.files import replace_file
from imagerag.storage.locks import writer_lock

_PLANNED = ("url", "caption", "source", "licence", "expected_sha256", "folder", "member")
_ASKED_AGAIN = ("etag", "last_modified", "known_sha256")
PLAN_SCHEMA = pa.schema([(name, pa.string()) for name in (*_PLANNED, *_ASKED_AGAIN)])
"""Rows of a shard. Either all rows have the same `folder`, with `member` naming an image in it, or none has one.

For a URL that is requested again, `known_sha256` is the SHA-256 of its stored image, and `etag` and `last_modified` are
the headers that its server sent. A row that gives no new image is left out of the shard, and the previous one stays.
"""

SHARD_DIGITS = 5
ROW_DIGITS = 4
"""The key of a sample is its shard's id, in at least `SHARD_DIGITS` digits, and its row, in `ROW_DIGITS` digits."""


@dataclass(frozen=True)
class Shard:
    """A shard, finished or not. It holds no open handle, so it can be pickled and sent to workers."""

    folder: str
    """URI of the corpus."""
    id: int

    @property
    def name(self) -> str:
        """Common prefix of the names of its files."""
        return f"{self.id:0{SHARD_DIGITS}d}"

    @property
    def tar(self) -> str:
        """URI of its samples."""
        return f"{self.folder}/{self.name}.tar"

    @property
    def _plan(self) -> str:
        return f"{self.folder}/plan/{self.name}.parquet"

    def lock(self) -> AbstractContextManager[None]:
        """Lock out other workers that fetch this shard; see `imagerag.storage.locks`."""
        return writer_lock(f"{self.folder}/plan", self.name)

    def is_finished(self) -> bool:
        """Return whether it has its completion marker. A marker that is only half written does not count."""
        fs, path = fsspec.url_to_fs(f"{self.folder}/{self.name}_stats.json")
        try:
            return isinstance(json.loads(fs.cat_file(path)), dict)
        except (FileNotFoundError, ValueError):
            return False

    def plan(self) -> pa.Table:
        """Return its planned rows; columns as in `PLAN_SCHEMA`."""
        fs, path = fsspec.url_to_fs(self._plan)
        return pq.read_table(pa.BufferReader(fs.cat_file(path)), schema=PLAN_SCHEMA)

    def write_plan(self, rows: pa.Table) -> None:
        """Write the plan of a new shard.

        Raises:
            ConflictError: if another process has planned it already.
        """
        assert rows.num_rows <= 10**ROW_DIGITS
        replace_file(self._plan, to_parquet(rows.cast(PLAN_SCHEMA)), None)


@dataclass(frozen=True, kw_only=True)
class FetchedShard:
    """Result of fetching a shard. Defined here so that the driver need not import img2dataset to read it."""

    num_urls: int
    num_bytes: int
    """Size of the images as stored."""
    duration_s: float
    num_unchanged: int = 0
    """Number of URLs requested again that returned the same image."""
    num_changed: int = 0
    """Number of URLs requested again that returned another image."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Number of URLs requested again that returned no image, by reason; the previous image stays."""


def to_parquet(rows: pa.Table) -> bytes:
    """Return rows as the content of a parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
