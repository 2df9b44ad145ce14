"""The files of a corpus, in a folder at any fsspec URI.

    wanted.parquet        the rows that the corpus wants now, from all lists; replaced as a whole
    takedowns.parquet     the URLs and SHA-256s that it must never contain
    plan/00012.parquet    the URLs of shard 12, written before anything is fetched
    00012.tar             its images, captions and metadata, as webdataset
    00012.parquet         the outcome of each of its URLs
    00012_stats.json      its completion marker, written last

The last three are img2dataset's output. Shard ids only increase, and a finished shard is never fetched again. The first
three are replaced atomically; plans and takedowns, only if they have not changed since they were read.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from imagerag.corpus import url_list
from imagerag.storage.files import ConflictError, put_file, read_tagged, replace_file
from imagerag.storage.locks import OnWait, check_locks, writer_lock

logger = logging.getLogger(__name__)

_PLANNED = ("url", "caption", "source", "licence", "expected_sha256", "folder", "member")
_ASKED_AGAIN = ("etag", "last_modified", "known_sha256")
PLAN_SCHEMA = pa.schema([(name, pa.string()) for name in (*_PLANNED, *_ASKED_AGAIN)])
"""Rows of a shard. Either all rows have the same `folder`, with `member` naming an image in it, or none has one.

For a URL that is requested again, `known_sha256` is the SHA-256 of its stored image, and `etag` and `last_modified` are
the headers that its server sent. A row that gives no new image is left out of the shard, and the previous one stays.
"""
TAKEDOWN_SCHEMA = pa.schema([("url", pa.string()), ("sha256", pa.string())])

SHARD_DIGITS = 5
ROW_DIGITS = 4
"""The key of a sample is its shard's id, in at least `SHARD_DIGITS` digits, and its row, in `ROW_DIGITS` digits."""

IN_FLIGHT_BYTES = 256 * 2**20
"""Maximum bytes of files that one worker holds, fetched and not yet stored."""

_NUM_READERS = 32


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


def open_folder(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of `uri`, with its cache of listings cleared, and the folder's path on it."""
    fs, root = fsspec.core.url_to_fs(uri)
    fs.invalidate_cache()
    return fs, root.rstrip("/")


def shard_path(uri: str, shard: int) -> str:
    """Return the path of a shard's tar."""
    return f"{uri.rstrip('/')}/{shard_name(shard)}.tar"


def shard_name(shard: int) -> str:
    """Return the common prefix of the names of a shard's files."""
    return f"{shard:0{SHARD_DIGITS}d}"


def finished_shards(uri: str) -> dict[int, dict[str, Any]]:
    """Return img2dataset's statistics of every finished shard, by id. Half-written statistics are ignored."""
    fs, root = open_folder(uri)
    paths = fs.glob(f"{root}/*_stats.json")
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        stats = pool.map(lambda path: _parsed(fs.cat_file(path)), paths)
    found = {_id_of(path.removesuffix("_stats.json")): entry for path, entry in zip(paths, stats, strict=True)}
    return {shard: entry for shard, entry in sorted(found.items()) if entry is not None}


def is_finished(uri: str, shard: int) -> bool:
    """Return whether the shard has its completion marker."""
    fs, root = open_folder(uri)
    path = f"{root}/{shard_name(shard)}_stats.json"
    return fs.exists(path) and _parsed(fs.cat_file(path)) is not None


def planned_shards(uri: str) -> list[int]:
    """Return the ids of all shards that were ever planned, in order."""
    fs, root = open_folder(uri)
    return sorted(map(_id_of, fs.glob(f"{root}/plan/*.parquet")))


def read_plans(uri: str, shards: Iterable[int]) -> dict[int, pa.Table]:
    """Return the planned rows of shards, by id; columns as in `PLAN_SCHEMA`."""
    fs, root = open_folder(uri)
    shards = list(shards)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        tables = pool.map(lambda shard: _get_table(fs, _plan_path(root, shard), PLAN_SCHEMA), shards)
    return dict(zip(shards, tables, strict=True))


def write_plan(uri: str, shard: int, rows: pa.Table) -> None:
    """Write the plan of a new shard.

    Raises:
        ConflictError: if another process has planned it already.
    """
    assert rows.num_rows <= 10**ROW_DIGITS
    replace_file(_plan_path(uri.rstrip("/"), shard), _to_parquet(rows.cast(PLAN_SCHEMA)), None)


def read_wanted(uri: str) -> pa.Table:
    """Return the rows that the corpus wants; columns as in `url_list.SCHEMA`. Empty if there is no corpus yet."""
    fs, root = open_folder(uri)
    return _get_table(fs, f"{root}/wanted.parquet", url_list.SCHEMA)


def iter_wanted(uri: str) -> Iterator[pa.Table]:
    """Yield the rows of `read_wanted` in batches."""
    fs, root = open_folder(uri)
    path = f"{root}/wanted.parquet"
    if not fs.exists(path):
        return
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)  # a dataset would decode the whole file ahead of a slow reader
        names = [name for name in url_list.SCHEMA.names if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(columns=names):
            missing = {name: pa.nulls(len(batch), pa.string()) for name in url_list.SCHEMA.names if name not in names}
            columns = {name: batch.column(name) for name in names} | missing
            yield pa.table({name: columns[name] for name in url_list.SCHEMA.names}, schema=url_list.SCHEMA)


def write_wanted(uri: str, rows: Iterable[pa.Table]) -> None:
    """Replace the rows that the corpus wants. The caller must hold the lock of the corpus.

    The file may be too large for one request to an object store, so it is not written conditionally.
    """
    with TemporaryDirectory(prefix="imagerag-") as folder:
        path = Path(folder, "wanted.parquet")
        with pq.ParquetWriter(path, url_list.SCHEMA) as writer:
            for some in rows:
                writer.write_table(some.cast(url_list.SCHEMA))
        check_locks()
        put_file(f"{uri.rstrip('/')}/wanted.parquet", path)


def read_takedowns(uri: str) -> pa.Table:
    """Return what the corpus must not contain; columns as in `TAKEDOWN_SCHEMA`, one of them null in every row."""
    fs, root = open_folder(uri)
    return _get_table(fs, f"{root}/takedowns.parquet", TAKEDOWN_SCHEMA)


def update_takedowns(uri: str, change: Callable[[pa.Table], pa.Table]) -> tuple[pa.Table, pa.Table]:
    """Replace the takedowns by the result of `change`; return them before and after."""
    return _update(f"{uri.rstrip('/')}/takedowns.parquet", TAKEDOWN_SCHEMA, change)


@contextmanager
def locked(uri: str, shard: int | None = None, on_wait: OnWait = logger.info) -> Iterator[None]:
    """Hold the lock of a corpus, or of one of its shards; see `imagerag.storage.locks`."""
    folder, name = (uri, "corpus") if shard is None else (f"{uri.rstrip('/')}/plan", shard_name(shard))
    with writer_lock(folder, name, on_wait):
        yield


def _plan_path(root: str, shard: int) -> str:
    return f"{root}/plan/{shard_name(shard)}.parquet"


def _id_of(path: str) -> int:
    return int(Path(path).stem)


def _parsed(stats: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(stats)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _get_table(fs: fsspec.AbstractFileSystem, path: str, schema: pa.Schema) -> pa.Table:
    try:
        data = fs.cat_file(path)
    except FileNotFoundError:
        return schema.empty_table()
    return pq.read_table(pa.BufferReader(data), schema=schema)


def _update(path: str, schema: pa.Schema, change: Callable[[pa.Table], pa.Table]) -> tuple[pa.Table, pa.Table]:
    """Replace a table by the result of `change`, and retry if another process has changed it meanwhile."""
    while True:
        data, tag = read_tagged(path)
        before = schema.empty_table() if data is None else pq.read_table(pa.BufferReader(data), schema=schema)
        after = change(before).cast(schema)
        if after.equals(before):
            return before, after
        with suppress(ConflictError):
            replace_file(path, _to_parquet(after), tag)
            return before, after


def _to_parquet(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
