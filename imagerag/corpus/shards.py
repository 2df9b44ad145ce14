"""The files of a corpus, in a folder that any fsspec URI names.

    wanted.parquet        what the corpus wants now: the lists' rows, replaced as a whole
    takedowns.parquet     what it must never hold: URLs and SHA-256s
    plan/00012.parquet    the URLs of shard 12, written before anything is fetched
    00012.tar             its images, captions and metadata, as webdataset
    00012.parquet         what became of each of its URLs
    00012_stats.json      the mark that the shard is finished, written last

The last three are img2dataset's own output. The ids of shards only grow, and a finished shard is never fetched
again. Every file of our own is replaced atomically.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from imagerag.corpus import url_list

_PLANNED = ("url", "caption", "source", "licence", "expected_sha256", "folder", "member")
_ASKED_AGAIN = ("etag", "last_modified", "known_sha256")
PLAN_SCHEMA = pa.schema([(name, pa.string()) for name in (*_PLANNED, *_ASKED_AGAIN)])
"""Rows of a shard: `folder` is there in all of them or in none, and is one; `member` names an image in it.

`known_sha256` is that of the image which the corpus has of a URL that is asked whether it is another one now, and
`etag` and `last_modified` are what its server said of it. A row without a new image is left out of the shard: the one
of before stands.
"""
TAKEDOWN_SCHEMA = pa.schema([("url", pa.string()), ("sha256", pa.string())])

SHARD_DIGITS = 5
ROW_DIGITS = 4
"""The key of a sample is its shard's id, in `SHARD_DIGITS` digits or more, and its row, in `ROW_DIGITS`."""

IN_FLIGHT_BYTES = 256 * 2**20
"""Files that one worker holds at a time, fetched and not yet stored."""

_NUM_READERS = 32


@dataclass(frozen=True, kw_only=True)
class FetchedShard:
    """What fetching a shard came to. Here, where the driver can read it without the engine that only workers need."""

    num_urls: int
    num_bytes: int
    """Size of its images as stored."""
    duration_s: float
    num_unchanged: int = 0
    """Of the URLs that were asked again: those with the same image."""
    num_changed: int = 0
    """Those with another one."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Those that brought none, by reason: the image of before stays."""


def open_folder(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `uri` and the folder's path on it. Nothing is read from a cache of listings."""
    fs, root = fsspec.core.url_to_fs(uri)
    fs.invalidate_cache()
    return fs, root.rstrip("/")


def shard_path(uri: str, shard: int) -> str:
    """The tar of a shard."""
    return f"{uri.rstrip('/')}/{shard_name(shard)}.tar"


def shard_name(shard: int) -> str:
    """What the names of the shard's files begin with."""
    return f"{shard:0{SHARD_DIGITS}d}"


def finished_shards(uri: str) -> dict[int, dict[str, Any]]:
    """img2dataset's statistics of every finished shard, by id. A half-written file of them doesn't count."""
    fs, root = open_folder(uri)
    paths = fs.glob(f"{root}/*_stats.json")
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        stats = pool.map(lambda path: _parsed(fs.cat_file(path)), paths)
    found = {_id_of(path.removesuffix("_stats.json")): entry for path, entry in zip(paths, stats, strict=True)}
    return {shard: entry for shard, entry in sorted(found.items()) if entry is not None}


def is_finished(uri: str, shard: int) -> bool:
    """Whether the shard has its completion marker."""
    fs, root = open_folder(uri)
    path = f"{root}/{shard_name(shard)}_stats.json"
    return fs.exists(path) and _parsed(fs.cat_file(path)) is not None


def planned_shards(uri: str) -> list[int]:
    """The ids of all shards that were ever planned, in order."""
    fs, root = open_folder(uri)
    return sorted(map(_id_of, fs.glob(f"{root}/plan/*.parquet")))


def read_plans(uri: str, shards: Iterable[int]) -> dict[int, pa.Table]:
    """The planned rows of shards, by id; columns as in `PLAN_SCHEMA`."""
    fs, root = open_folder(uri)
    shards = list(shards)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        tables = pool.map(lambda shard: _get_table(fs, _plan_path(root, shard), PLAN_SCHEMA), shards)
    return dict(zip(shards, tables, strict=True))


def write_plan(uri: str, shard: int, rows: pa.Table) -> None:
    """Fix the rows of a new shard."""
    fs, root = open_folder(uri)
    assert rows.num_rows <= 10**ROW_DIGITS
    assert not fs.exists(_plan_path(root, shard))
    _put_table(fs, _plan_path(root, shard), rows.cast(PLAN_SCHEMA))


def read_wanted(uri: str) -> pa.Table:
    """What the corpus wants; columns as in `url_list.SCHEMA`. Empty if there is no corpus yet."""
    fs, root = open_folder(uri)
    return _get_table(fs, f"{root}/wanted.parquet", url_list.SCHEMA)


def iter_wanted(uri: str) -> Iterator[pa.Table]:
    """Yield what the corpus wants, some rows at a time, as `read_wanted` has them."""
    fs, root = open_folder(uri)
    path = f"{root}/wanted.parquet"
    if not fs.exists(path):
        return
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)  # not a dataset, which decodes a whole file ahead of who reads it slowly
        names = [name for name in url_list.SCHEMA.names if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(columns=names):
            missing = {name: pa.nulls(len(batch), pa.string()) for name in url_list.SCHEMA.names if name not in names}
            columns = {name: batch.column(name) for name in names} | missing
            yield pa.table({name: columns[name] for name in url_list.SCHEMA.names}, schema=url_list.SCHEMA)


def write_wanted(uri: str, rows: Iterable[pa.Table]) -> None:
    """Replace what the corpus wants."""
    fs, root = open_folder(uri)
    with TemporaryDirectory(prefix="imagerag-") as folder:
        path = Path(folder, "wanted.parquet")
        with pq.ParquetWriter(path, url_list.SCHEMA) as writer:
            for some in rows:
                writer.write_table(some.cast(url_list.SCHEMA))
        put_file(fs, f"{root}/wanted.parquet", path)


def read_takedowns(uri: str) -> pa.Table:
    """What the corpus must not hold; columns as in `TAKEDOWN_SCHEMA`, one of them null in every row."""
    fs, root = open_folder(uri)
    return _get_table(fs, f"{root}/takedowns.parquet", TAKEDOWN_SCHEMA)


def write_takedowns(uri: str, rows: pa.Table) -> None:
    """Replace the takedowns."""
    fs, root = open_folder(uri)
    _put_table(fs, f"{root}/takedowns.parquet", rows.cast(TAKEDOWN_SCHEMA))


def put(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Write a file as a whole or not at all."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)  # object stores show an object when it is complete
        return
    with _replacing(Path(path)) as file:
        file.write(data)


def put_file(fs: fsspec.AbstractFileSystem, path: str, source: Path) -> None:
    """Copy a file of this machine as a whole or not at all."""
    if not isinstance(fs, LocalFileSystem):
        fs.put_file(str(source), path)
        return
    with _replacing(Path(path)) as file, source.open("rb") as content:
        shutil.copyfileobj(content, file)


@contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `target` when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    with unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(target)


@contextmanager
def locked(uri: str, shard: int | None = None, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a corpus in a local folder, or one of its shards, for this process alone.

    The operating system ends the lock with the process, however it dies. Object stores have no locks: there, only one
    download of a corpus may run at a time.
    """
    fs, root = open_folder(uri)
    if not isinstance(fs, LocalFileSystem):
        yield
        return
    path = Path(root, "lock") if shard is None else Path(_plan_path(root, shard))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
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


def _put_table(fs: fsspec.AbstractFileSystem, path: str, rows: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    put(fs, path, sink.getvalue().to_pybytes())
