"""The worker's part of a download: one shard. Imported in workers only.

img2dataset's are the steps, the shard's files and what is in them; three classes of ours go where it has its own:

    Downloader                GuardedDownloader: what is fetched, how, and that every row has its status
    Resizer                   UprightResizer: what is decoded, and what is stored of it
    WebDatasetSampleWriter    img2dataset's own
"""

import hashlib
import io
import os
import time
from collections.abc import Mapping
from multiprocessing.pool import ThreadPool
from threading import Condition
from typing import IO, Any, NamedTuple
from urllib.request import OpenerDirector

import pyarrow as pa

from imagerag.corpus import shards
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.guard import FetchError, Reason
from imagerag.corpus.opener import guarded_opener
from imagerag.corpus.photos import FORMATS, decode, open_image
from imagerag.corpus.stores import Store
from imagerag.images import is_shown_as_stored

# img2dataset's image library asks the internet for its newest version at import, unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from img2dataset.downloader import Downloader, compute_key, is_disallowed
from img2dataset.logger import CappedCounter, write_stats
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter

_ENCODE_QUALITY = {"jpg": 95, "webp": 95, "png": 6}  # of png, the zlib level
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": _ENCODE_QUALITY["jpg"]},
    "webp": {"format": "WEBP", "quality": _ENCODE_QUALITY["webp"]},
    "png": {"format": "PNG", "compress_level": _ENCODE_QUALITY["png"]},
}
_OPT_OUT_DIRECTIVES = {"noai", "noimageai", "noindex", "noimageindex"}
_ROBOTS_NAME = "imageragturbo"  # addresses this program alone in an X-Robots-Tag header
_STATUSES = ("success", "failed_to_download", "failed_to_resize")  # in the order in which `write_stats` counts them
_NOT_STORED = ("folder", "member")  # where this machine finds an image: of no use elsewhere
_STORED_SCHEMA = pa.schema(
    [field for field in shards.PLAN_SCHEMA if field.name not in _NOT_STORED]
    + [(name, pa.string()) for name in ("key", "status", "error_message")]
    + [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    + [("sha256", pa.string())]
)


class _Fetched(NamedTuple):
    body: bytes | None
    error: str | None
    num_bytes_held: int


def fetch_shard(uri: str, shard: int, rows: pa.Table, config: DownloadConfig) -> shards.FetchedShard:
    """Fetch `rows` into shard `shard` of the corpus, unless it is finished.

    Args:
        rows: as `shards.PLAN_SCHEMA` has them.
    """
    started = time.monotonic()
    resizer = UprightResizer(config)
    # A worker that outlived its driver may still be at the shard: wait for its end.
    with shards.locked(uri, shard):
        if not shards.is_finished(uri, shard):
            GuardedDownloader(uri, config, resizer).download_shard((shard, rows))
    return shards.FetchedShard(
        num_urls=rows.num_rows, num_bytes=resizer.num_bytes_out, duration_s=time.monotonic() - started
    )


class GuardedDownloader(Downloader):  # type: ignore[misc]
    """Fetches by the guarded opener, checks every file's hash, and gives every row its status, whatever comes of it."""

    def __init__(self, uri: str, config: DownloadConfig, resizer: Resizer) -> None:
        super().__init__(
            sample_writer_class=WebDatasetSampleWriter,
            resizer=resizer,
            thread_count=config.thread_count,
            save_caption=True,
            extract_exif=False,
            output_folder=uri,
            column_list=[name for name in shards.PLAN_SCHEMA.names if name not in _NOT_STORED],
            timeout=config.timeout_s,
            number_sample_per_shard=10**shards.ROW_DIGITS,
            oom_shard_count=shards.SHARD_DIGITS,
            compute_hash="sha256",
            verify_hash_type="sha256",
            encode_format=config.image_format,
            retries=config.retries,
            user_agent_token=_ROBOTS_NAME,
            disallowed_header_directives=_OPT_OUT_DIRECTIVES if config.respect_opt_out else None,
        )
        self._config = config
        self._budget = ByteBudget(max(config.max_bytes, shards.IN_FLIGHT_BYTES))

    def download_shard(self, row: tuple[int, pa.Table]) -> None:
        """Fetch the rows of one shard, and write it."""
        shard, table = row
        started, counts, statuses = time.time(), dict.fromkeys(_STATUSES, 0), CappedCounter()
        rows = table.to_pylist()
        (folder,) = table["folder"].unique().to_pylist()
        opener = Store(folder, self._config.max_bytes) if folder else guarded_opener(self._config)
        writer = self.sample_writer_class(
            shard, self.output_folder, self.save_caption, self.oom_shard_count, _STORED_SCHEMA, self.encode_format
        )
        with ThreadPool(self.thread_count) as pool:
            for index, fetched in pool.imap_unordered(lambda it: (it[0], self._fetch(opener, it[1])), enumerate(rows)):
                image, outcome = self._store(fetched, rows[index]["expected_sha256"])
                self._budget.give_back(fetched.num_bytes_held)
                counts[outcome["status"]] += 1
                statuses.increment(outcome["error_message"] or "success")
                key = compute_key(index, shard, shards.ROW_DIGITS, self.oom_shard_count)
                sample = {name: rows[index][name] for name in self.column_list} | {"key": key} | outcome
                writer.write(image, key, sample["caption"], sample)
        writer.close()
        write_stats(
            self.output_folder, shard, len(rows), *counts.values(), started, time.time(), statuses, self.oom_shard_count
        )

    def _fetch(self, opener: OpenerDirector | Store, row: Mapping[str, str]) -> "_Fetched":
        """The file of a row. What it may be large is taken from the budget, which the caller gives back."""
        for attempt in range(1 + self.retries):
            fetched = self._try_to_fetch(opener, row["member"] if isinstance(opener, Store) else row["url"])
            if fetched.body is not None or attempt == self.retries:
                break
        return fetched

    def _try_to_fetch(self, opener: OpenerDirector | Store, url: str) -> "_Fetched":
        held = 0
        try:
            with opener.open(url, timeout=self.timeout) as response:
                if self.disallowed_header_directives and is_disallowed(
                    response.headers, self.user_agent_token, self.disallowed_header_directives
                ):
                    raise FetchError(Reason.OPT_OUT, "X-Robots-Tag")
                size = min(response.length or self._config.max_bytes, self._config.max_bytes)
                response.deadline += self._budget.take(size)
                held = size
                return _Fetched(response.read(), None, held)
        except Exception as error:  # noqa: BLE001 - a row that fails is a row that says so
            self._budget.give_back(held)
            message = error if isinstance(error, FetchError) else FetchError(Reason.OTHER, repr(error))
            return _Fetched(None, str(message), 0)

    def _store(self, fetched: "_Fetched", expected_sha256: str | None) -> tuple[bytes | None, dict[str, Any]]:
        """The image to store, if there is one, and the row's columns that tell of it."""
        names = ("width", "height", "original_width", "original_height")
        failed = dict.fromkeys((*names, "sha256"))
        if fetched.body is None:
            return None, {"status": "failed_to_download", "error_message": fetched.error, **failed}
        sha256 = hashlib.sha256(fetched.body).hexdigest()
        if expected_sha256 not in (None, sha256):
            message = str(FetchError(Reason.HASH_MISMATCH, f"the file's SHA-256 is {sha256}"))
            return None, {"status": "failed_to_download", "error_message": message, **failed}
        image, *sizes, message = self.resizer(io.BytesIO(fetched.body))
        if message is not None:
            return None, {"status": "failed_to_resize", "error_message": message, **failed}
        told = dict(zip(names, sizes, strict=True))
        return image, {"status": "success", "error_message": None, **told, "sha256": sha256}


class UprightResizer(Resizer):  # type: ignore[misc]
    """Decodes what may be decoded, as people see it, and makes it as small as the corpus stores it."""

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
        """The image and its sizes, or nulls and a message that begins with its `Reason`."""
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


class ByteBudget:
    """How many bytes of files all threads together may hold that are not stored yet."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._returned = Condition()

    def take(self, num_bytes: int) -> float:
        """Take a part, when there is as much left; return for how many seconds that was waited for."""
        started = time.monotonic()
        with self._returned:
            self._returned.wait_for(lambda: num_bytes <= self._left)
            self._left -= num_bytes
        return time.monotonic() - started

    def give_back(self, num_bytes: int) -> None:
        """Give a part back."""
        with self._returned:
            self._left += num_bytes
            self._returned.notify_all()
