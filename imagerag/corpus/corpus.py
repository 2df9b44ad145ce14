"""A corpus: what it wants, what it must never contain, and its shards, in a folder at any fsspec URI.

    wanted.parquet        the rows that the corpus wants now, from all lists; replaced as a whole
    outcomes.json         how many of them have which outcome, as long as nothing changes
    takedowns.parquet     the URLs and SHA-256s that it must never contain
    plan/, 00012.*        its shards, with increasing ids; see `Shard`

The files are replaced atomically; takedowns, only if they have not changed since they were read.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from imagerag.corpus import url_list
from imagerag.corpus.shards import Shard, to_parquet
from imagerag.storage.files import ConflictError, put_file, read_tagged, replace_file
from imagerag.storage.locks import OnWait, check_locks, writer_lock
from imagerag.storage.memo import Memo

logger = logging.getLogger(__name__)

TAKEDOWN_SCHEMA = pa.schema([("url", pa.string()), ("sha256", pa.string())])

_NUM_READERS = 32
_LAST_LIST = b"imagerag.list"


@dataclass(frozen=True)
class Corpus:
    """A corpus. It holds no open handle, so it can be pickled and sent to workers."""

    uri: str
    """Its folder: an absolute path or an object-store URI, as `Settings.shards_of` gives."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", self.uri.rstrip("/"))

    def lock(self, on_wait: OnWait = logger.info) -> AbstractContextManager[None]:
        """Lock out other jobs that change the corpus; see `imagerag.storage.locks`."""
        return writer_lock(self.uri, "corpus", on_wait)

    def open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return its file system, with the cache of listings cleared, and the folder's path on it."""
        fs, root = fsspec.url_to_fs(self.uri)
        fs.invalidate_cache()
        return fs, root

    def shard(self, id: int) -> Shard:
        """Return one of its shards, planned or not."""
        return Shard(self.uri, id)

    def planned(self) -> list[Shard]:
        """Return all shards that were ever planned, in order."""
        return self._shards("plan/*.parquet")

    def finished(self) -> list[Shard]:
        """Return all finished shards, in order."""
        marked = self._shards("*_stats.json")
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            return list(compress(marked, pool.map(Shard.is_finished, marked)))

    def plans(self, shards: Sequence[Shard]) -> Iterator[pa.Table]:
        """Yield the planned rows of each shard. A few plans are in memory at a time."""
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            for start in range(0, len(shards), _NUM_READERS):
                yield from pool.map(Shard.plan, shards[start : start + _NUM_READERS])

    def _shards(self, pattern: str) -> list[Shard]:
        fs, root = self.open()
        found = fs.glob(f"{root}/{pattern}")
        return [self.shard(id) for id in sorted(int(PurePosixPath(path).stem.partition("_")[0]) for path in found)]

    def wanted(self) -> Iterator[pa.Table]:
        """Yield the rows that it wants, in batches; columns as in `url_list.SCHEMA`. None if there is no corpus yet."""
        fs, root = self.open()
        with suppress(FileNotFoundError), fs.open(f"{root}/wanted.parquet", "rb") as file:
            parquet = pq.ParquetFile(file)  # a dataset would decode the whole file ahead of a slow reader
            names = [name for name in url_list.SCHEMA.names if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(columns=names):
                absent = pa.nulls(len(batch), pa.string())
                columns = [batch.column(name) if name in names else absent for name in url_list.SCHEMA.names]
                yield pa.table(columns, schema=url_list.SCHEMA)

    def want(self, rows: Iterable[pa.Table], last: str = "", *, is_all: bool = False) -> None:
        """Replace the rows that it wants. The caller must hold the lock.

        The file may be too large for one request to an object store, so it is not written conditionally.

        Args:
            rows: the rows.
            last: digest of the list that was added last.
            is_all: whether there are no other rows than those of that list.
        """
        metadata = {_LAST_LIST: json.dumps({"digest": last, "is_all": is_all}).encode()}
        with TemporaryDirectory(prefix="imagerag-") as folder:
            path = Path(folder, "wanted.parquet")
            with pq.ParquetWriter(path, url_list.SCHEMA.with_metadata(metadata)) as writer:
                for some in rows:
                    writer.write_table(some.cast(url_list.SCHEMA))
            check_locks()
            put_file(f"{self.uri}/wanted.parquet", path)

    def last_list(self) -> tuple[str, bool]:
        """Return the digest of the list that was added last, and whether it has all wanted rows; empty if unknown."""
        fs, root = self.open()
        with suppress(FileNotFoundError), fs.open(f"{root}/wanted.parquet", "rb") as file:
            last = json.loads((pq.read_schema(file).metadata or {}).get(_LAST_LIST, b"{}"))
            return last.get("digest", ""), last.get("is_all", False)
        return "", False

    def state(self) -> str:
        """Return a digest of everything that plans and outcomes depend on: the versions of its files, except images.

        A version is all that the file system states about a file, as in fsspec's `ukey`, but from one listing: sizes
        and times or inodes, ETags or generations.
        """
        fs, root = self.open()
        files = sorted(fs.find(root, detail=True).items())
        versions = [
            sorted((name, str(value)) for name, value in about.items())
            for path, about in files
            if path.endswith((".parquet", "_stats.json"))
        ]
        return hashlib.sha256(json.dumps(versions).encode()).hexdigest()

    def outcomes(self) -> Memo:
        """Return where the numbers of outcomes are kept while nothing changes. The messages with them name URLs."""
        return Memo(f"{self.uri}/outcomes.json", self.state())

    def takedowns(self) -> pa.Table:
        """Return what it must not contain; columns as in `TAKEDOWN_SCHEMA`, one of them null in every row."""
        return self._tagged_takedowns()[0]

    def block(self, *, urls: Iterable[str] = (), sha256s: Iterable[str] = ()) -> None:
        """Add to its takedowns. If another process changes them meanwhile, they contain its entries too."""
        entries = [*({"url": url} for url in urls), *({"sha256": sha256} for sha256 in sha256s)]
        added = pa.Table.from_pylist(entries, TAKEDOWN_SCHEMA)
        while True:
            before, tag = self._tagged_takedowns()
            after = pa.concat_tables([before, added]).group_by(TAKEDOWN_SCHEMA.names).aggregate([])
            if len(after) == len(before):
                return
            with suppress(ConflictError):
                replace_file(f"{self.uri}/takedowns.parquet", to_parquet(after), tag)
                return

    def _tagged_takedowns(self) -> tuple[pa.Table, str | None]:
        content, tag = read_tagged(f"{self.uri}/takedowns.parquet")
        if content is None:
            return TAKEDOWN_SCHEMA.empty_table(), None
        return pq.read_table(pa.BufferReader(content), schema=TAKEDOWN_SCHEMA), tag
