"""The worker's part of a download: fetching one shard. Imported in workers only.

The steps, the shard's files and their contents are those of img2dataset, with its classes replaced:

    Downloader                by GuardedDownloader: what is fetched, how, and that every row gets a status
    Resizer                   by UprightResizer: what is decoded, and what is stored of it
    WebDatasetSampleWriter    by CompactWriter: the same entries with smaller headers, in less time
"""

import hashlib
import io
import json
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from email.message import Message
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, Request

import pyarrow as pa

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.guard import ByteBudget, FetchError, Reason, reason_of
from imagerag.corpus.hosts import Hosts, Queue, host_of
from imagerag.corpus.names import Names
from imagerag.corpus.opener import NotModifiedError, guarded_opener
from imagerag.corpus.photos import FORMATS, decode, open_image
from imagerag.corpus.shards import ROW_DIGITS, SHARD_DIGITS, FetchedShard, Shard
from imagerag.corpus.stores import FolderOpener, is_read_in_order
from imagerag.images import is_shown_as_stored

# Without this, img2dataset's image library checks online for a newer version of itself at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
# webdataset imports torch for its loader, if it can: 180 MB and 0.9 s for each worker. Only its writer is used here. In
# a process that imported this module before torch, webdataset's loader does not work.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
try:
    from img2dataset.downloader import Downloader, compute_key, is_disallowed
    from img2dataset.logger import CappedCounter, write_stats
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter
finally:
    if sys.modules.get("torch") is None:
        del sys.modules["torch"]

_ENCODE_QUALITY = {"jpg": 95, "webp": 95, "png": 6}  # for png, the zlib level
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": _ENCODE_QUALITY["jpg"]},
    "webp": {"format": "WEBP", "quality": _ENCODE_QUALITY["webp"]},
    "png": {"format": "PNG", "compress_level": _ENCODE_QUALITY["png"]},
}
_OPT_OUT_DIRECTIVES = {"noai", "noimageai", "noindex", "noimageindex"}
_ROBOTS_NAME = "imageragturbo"  # addresses only this program in an X-Robots-Tag header
_STATUSES = ("success", "failed_to_download", "failed_to_resize")  # in the order of the arguments of `write_stats`
_MAX_VALIDATOR = 1_000  # characters
_GIVEN = ["url", "caption", "source", "licence", "expected_sha256"]  # columns of a plan that are stored unchanged
_SIZES = ("width", "height", "original_width", "original_height")
_FOUND = ("sha256", "etag", "last_modified")
_STORED_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_GIVEN, "key", "status", "error_message")]
    + [(name, pa.int32()) for name in _SIZES]
    + [(name, pa.string()) for name in _FOUND]
)

Opener = OpenerDirector | FolderOpener


class _Fetched(NamedTuple):
    body: bytes | None = None
    """None for a URL that failed, or whose server reports that it has not changed."""
    error: FetchError | None = None
    num_bytes_held: int = 0
    etag: str | None = None
    last_modified: str | None = None


@lru_cache(maxsize=1)
def hosts_of(run: str, config: DownloadConfig, num_workers: int) -> Hosts:
    """Return this worker's knowledge of hosts in a run; that of earlier runs is dropped."""
    return Hosts(config, num_workers)


def fetch_shard(shard: Shard, rows: pa.Table, config: DownloadConfig, hosts: Hosts | None = None) -> FetchedShard:
    """Fetch `rows` into a shard, unless it is finished.

    Args:
        rows: rows with the columns of `shards.PLAN_SCHEMA`.

    Raises:
        UserError: if DNS does not work on this machine.
    """
    started = time.monotonic()
    resizer = UprightResizer(config)
    downloader = GuardedDownloader(shard.folder, config, resizer, hosts or Hosts(config))
    # A worker that outlived its driver may still be fetching this shard: wait until it has ended.
    with shard.lock():
        if not shard.is_finished():
            downloader.download_shard((shard.id, rows))
    return FetchedShard(
        num_urls=rows.num_rows,
        num_bytes=resizer.num_bytes_out,
        duration_s=time.monotonic() - started,
        num_unchanged=downloader.num_unchanged,
        num_changed=downloader.num_changed,
        kept=downloader.kept,
    )


class GuardedDownloader(Downloader):  # type: ignore[misc]
    """Fetches with the guarded opener at the pace of `Hosts`, verifies file hashes, and gives every row a status."""

    def __init__(self, folder: str, config: DownloadConfig, resizer: Resizer, hosts: Hosts) -> None:
        super().__init__(
            sample_writer_class=CompactWriter,
            resizer=resizer,
            thread_count=config.thread_count,
            save_caption=True,
            extract_exif=False,
            output_folder=folder,
            column_list=_GIVEN,
            timeout=config.timeout_s,
            number_sample_per_shard=10**ROW_DIGITS,
            oom_shard_count=SHARD_DIGITS,
            compute_hash="sha256",
            verify_hash_type="sha256",
            encode_format=config.image_format,
            retries=config.retries,
            user_agent_token=_ROBOTS_NAME,
            disallowed_header_directives=_OPT_OUT_DIRECTIVES if config.respect_opt_out else None,
        )
        self._config = config
        self._hosts = hosts
        self._budget = ByteBudget(config.in_flight_bytes)
        self.num_unchanged = self.num_changed = 0
        self.kept: Counter[str] = Counter()

    def download_shard(self, row: tuple[int, pa.Table]) -> None:
        """Fetch the rows of one shard and write its files."""
        shard, table = row
        started, counts, statuses = time.time(), dict.fromkeys(_STATUSES, 0), CappedCounter()
        rows = table.to_pylist()
        (folder,) = table["folder"].unique().to_pylist()
        opener, queue = self._open(rows, folder)
        writer = self.sample_writer_class(
            shard, self.output_folder, self.save_caption, self.oom_shard_count, _STORED_SCHEMA, self.encode_format
        )
        for index, fetched in self._bring_all(opener, queue, rows):
            image, outcome = self._store(fetched, rows[index])
            self._budget.give_back(fetched.num_bytes_held)
            counts[outcome["status"]] += 1
            statuses.increment(outcome["error_message"] or "success")
            if self._is_kept(rows[index], outcome):
                continue
            key = compute_key(index, shard, ROW_DIGITS, self.oom_shard_count)
            sample = {name: rows[index][name] for name in self.column_list} | {"key": key} | outcome
            writer.write(image, key, sample["caption"], sample)
        writer.close()
        self._hosts.forget_ordinary()
        write_stats(
            self.output_folder, shard, len(rows), *counts.values(), started, time.time(), statuses, self.oom_shard_count
        )

    def _open(self, rows: Sequence[Mapping[str, Any]], folder: str | None) -> tuple[Opener, Queue]:
        """Return the opener of the rows' images, and their queue; images of a folder have no host."""
        if folder is not None:
            return FolderOpener(folder, self._config.max_bytes), Queue([""] * len(rows), self._hosts)
        names = Names()
        names.require((urlsplit(row["url"]).hostname or "" for row in rows if host_of(row["url"])), self.timeout)
        return guarded_opener(self._config, names), Queue([row["url"] for row in rows], self._hosts)

    def _bring_all(
        self, opener: Opener, queue: Queue, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, "_Fetched"]]:
        """Yield what `_bring_one` returns for each row, in the order in which threads finish."""
        turns, results = iter(rows), SimpleQueue[Any]()

        def bring(_: int) -> None:
            for __ in turns:
                results.put(self._bring_one(opener, queue, rows))

        num_threads = min(self.thread_count, queue.most_at_once)
        if any(row["member"] is not None and is_read_in_order(row["member"]) for row in rows):
            num_threads = 1  # others would only wait for it, and then ask for rows that it has passed
        # One task per thread: a task per row would pass through two more threads of the pool.
        with ThreadPool(num_threads) as pool:
            pool.map_async(bring, range(num_threads), error_callback=results.put)
            for _ in rows:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result

    def _bring_one(self, opener: Opener, queue: Queue, rows: Sequence[Mapping[str, Any]]) -> tuple[int, "_Fetched"]:
        """Finish the next row of the queue; return its index, and its file or the reason why there is none.

        The file's maximum size is taken from the byte budget, and the caller gives it back.
        """
        while True:
            job = queue.take()
            if job.error is not None:
                return job.index, _Fetched(error=job.error)
            fetched = self._try_to_fetch(opener, rows[job.index])
            if fetched.error is None:
                queue.succeeded(job)
                return job.index, fetched
            if not queue.failed(job, fetched.error):
                return job.index, fetched

    def _try_to_fetch(self, opener: Opener, row: Mapping[str, Any]) -> "_Fetched":
        held = 0
        try:
            with self._opened(opener, row) as response:
                self._check_opt_out(response.headers)
                size = min(response.length or self._config.max_bytes, self._config.max_bytes)
                response.deadline += self._budget.take(size)
                held = size
                told = (_validator(response.headers.get(name)) for name in ("ETag", "Last-Modified"))
                return _Fetched(response.read(), None, held, *told)
        except NotModifiedError as answer:
            return self._unchanged(row, answer.headers)
        except Exception as error:  # noqa: BLE001 - any failure is recorded in its row
            self._budget.give_back(held)
            if isinstance(error, FetchError):
                return _Fetched(error=error)
            reason = Reason.INVALID_URL if isinstance(error, ValueError) else Reason.OTHER
            return _Fetched(error=FetchError(reason, str(error) or repr(error)))

    def _opened(self, opener: Opener, row: Mapping[str, Any]) -> Any:
        if isinstance(opener, FolderOpener):
            return opener.open(row["member"])
        validators = {"If-None-Match": row["etag"], "If-Modified-Since": row["last_modified"]}
        headers = {name: value for name, value in validators.items() if value}
        request = Request(row["url"], headers=headers)  # noqa: S310 - the opener checks the scheme
        return opener.open(request, timeout=self.timeout)

    def _unchanged(self, row: Mapping[str, Any], headers: Message) -> "_Fetched":
        try:
            self._check_opt_out(headers)
        except FetchError as error:
            return _Fetched(error=error)
        was_asked = row["known_sha256"] is not None
        return _Fetched(error=None if was_asked else FetchError(Reason.HTTP_STATUS, "304"))

    def _check_opt_out(self, headers: Message) -> None:
        directives = self.disallowed_header_directives
        if directives and is_disallowed(headers, self.user_agent_token, directives):
            raise FetchError(Reason.OPT_OUT, "X-Robots-Tag")

    def _is_kept(self, row: Mapping[str, Any], outcome: Mapping[str, Any]) -> bool:
        """Count a row that was requested again; return whether its previous image stays."""
        if row["known_sha256"] is None:
            return False
        if outcome["status"] == "success":
            is_same = outcome["sha256"] == row["known_sha256"]
            self.num_unchanged += is_same
            self.num_changed += not is_same
            return bool(is_same)
        reason = reason_of(outcome["error_message"])
        if reason is Reason.OPT_OUT:
            return False
        self.kept[str(reason)] += 1
        return True

    def _store(self, fetched: "_Fetched", row: Mapping[str, Any]) -> tuple[bytes | None, dict[str, Any]]:
        """Return the image to store, if there is one, and the row's result columns."""
        failed = dict.fromkeys((*_SIZES, *_FOUND))
        if fetched.error is not None:
            return None, {"status": "failed_to_download", "error_message": str(fetched.error), **failed}
        sha256 = row["known_sha256"] if fetched.body is None else hashlib.sha256(fetched.body).hexdigest()
        if row["expected_sha256"] not in (None, sha256):
            message = str(FetchError(Reason.HASH_MISMATCH, f"the file's SHA-256 is {sha256}"))
            return None, {"status": "failed_to_download", "error_message": message, **failed}
        told = {"sha256": sha256, "etag": fetched.etag, "last_modified": fetched.last_modified}
        if fetched.body is None or sha256 == row["known_sha256"]:
            return None, {"status": "success", "error_message": None, **failed, **told}
        image, *sizes, message = self.resizer(io.BytesIO(fetched.body))
        if message is not None:
            return None, {"status": "failed_to_resize", "error_message": message, **failed}
        return image, {"status": "success", "error_message": None, **dict(zip(_SIZES, sizes, strict=True)), **told}


def _validator(header: str | None) -> str | None:
    """Return a validator (`ETag` or `Last-Modified`) if it can be sent back unchanged, else None."""
    return header if header and header.isascii() and header.isprintable() and len(header) <= _MAX_VALIDATOR else None


class UprightResizer(Resizer):  # type: ignore[misc]
    """Decodes images of the accepted formats, upright and in sRGB, and scales them down to the stored size."""

    def __init__(self, config: DownloadConfig) -> None:
        super().__init__(
            image_size=config.image_size,
            resize_mode="keep_ratio_largest",
            resize_only_if_bigger=True,
            encode_quality=_ENCODE_QUALITY[config.image_format],
            encode_format=config.image_format,
            skip_reencode=True,
        )
        self.num_bytes_out = 0
        self._config = config

    def __call__(self, img_stream: IO[bytes], blurring_bbox_list: None = None) -> tuple[Any, ...]:
        """Return the encoded image and its sizes, or Nones and a message that begins with a `Reason`."""
        try:
            image = open_image(img_stream, self._config.formats, self._config.max_pixels)
            decoded = decode(image, img_stream, self.image_size)
        except FetchError as error:
            return (None,) * 5 + (str(error),)
        if image.format == FORMATS[self.what_ext] and max(image.size) <= self.image_size and is_shown_as_stored(image):
            img_stream.seek(0)
            stored = img_stream.read()
        else:
            file = io.BytesIO()
            decoded.save(file, **_SAVE_OPTIONS[self.encode_format])
            stored = file.getvalue()
        self.num_bytes_out += len(stored)
        return (stored, *decoded.size, *image.size, None)


class CompactWriter(WebDatasetSampleWriter):  # type: ignore[misc]
    """Writes webdataset shards with one header block per entry and JSON on one line.

    img2dataset's own writer puts two more blocks (1 KiB) before each of an image's three entries, for the fractions of
    a second of its time. Together with indented JSON, they took about a quarter of the interpreter's time for a shard
    of small images; copies of each entry took a tenth of its CPU time.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tarwriter.mtime = int(time.time())
        self.tarwriter.tarstream.format = tarfile.USTAR_FORMAT

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """Write a row's metadata, and its image and caption if there is an image."""
        if img_str is not None:
            files = {self.encode_format: img_str, "txt": (caption or "").encode(), "json": json.dumps(meta).encode()}
            for extension in sorted(files):
                entry, content = _Entry(f"{key}.{extension}"), files[extension]
                entry.size, entry.mtime, entry.mode = len(content), self.tarwriter.mtime, self.tarwriter.mode
                self.tarwriter.tarstream.addfile(entry, io.BytesIO(content))
        self.buffered_parquet_writer.write(meta)


class _Entry(tarfile.TarInfo):
    """An entry that nothing changes after it was added, so that `TarFile.addfile` need not copy it."""

    def __copy__(self) -> "_Entry":
        return self
