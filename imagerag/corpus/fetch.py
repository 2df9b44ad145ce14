"""The worker's part of a download: one shard, by img2dataset's own classes. Imported in workers only."""

import os
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from imagerag.corpus import shards
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.guard import FetchError, Reason, check_image
from imagerag.corpus.opener import guarded_fetching

# img2dataset's image library asks the internet for its newest version at import, unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter

_ENCODE_QUALITY = {"jpg": 95, "webp": 95, "png": 6}  # of png, the zlib level
_OPT_OUT_DIRECTIVES = ["noai", "noimageai", "noindex", "noimageindex"]
_ROBOTS_NAME = "imageragturbo"  # addresses this program alone in an X-Robots-Tag header


def fetch_shard(uri: str, shard: int, rows: pa.Table, config: DownloadConfig) -> shards.FetchedShard:
    """Fetch `rows` into shard `shard` of the corpus, unless it is finished.

    Args:
        rows: as `shards.PLAN_SCHEMA` has them.
    """
    started = time.monotonic()
    resizer = GuardedResizer(config)
    # A worker that outlived its driver may still be at the shard: wait for its end.
    with shards.locked(uri, shard):
        if not shards.is_finished(uri, shard):
            _download(uri, shard, rows, config, resizer)
    return shards.FetchedShard(
        num_urls=rows.num_rows, num_bytes=resizer.num_bytes_out, duration_s=time.monotonic() - started
    )


def _download(uri: str, shard: int, rows: pa.Table, config: DownloadConfig, resizer: Resizer) -> None:
    expected, (readable,) = rows["expected_sha256"], rows["folder"].unique().to_pylist()
    assert expected.null_count in (0, rows.num_rows)
    rows = rows.drop_columns(["folder"])  # of this machine: of no use in a shard
    if expected.null_count == 0:  # img2dataset verifies every row of a shard or none
        rows = rows.append_column("sha256", expected)
    downloader = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resizer,
        thread_count=config.thread_count,
        save_caption=True,
        extract_exif=False,
        output_folder=uri,
        column_list=rows.column_names,
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
    with tempfile.TemporaryDirectory() as folder, guarded_fetching(config, folder=readable):
        feather = Path(folder, "rows.feather")  # img2dataset removes its input
        with pa.ipc.new_file(str(feather), rows.schema) as writer:
            writer.write_table(rows)
        # Not `downloader(...)`, which turns an exception into a return value and a line on the console.
        downloader.download_shard((shard, str(feather)))


class GuardedResizer(Resizer):  # type: ignore[misc]
    """img2dataset's resizer, which decodes only what passes `check_image`."""

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
        self._max_pixels = config.max_pixels

    def __call__(self, img_stream: IO[bytes], blurring_bbox_list: None = None) -> tuple[Any, ...]:
        """The image and its sizes, or nulls and a message that begins with its `Reason`."""
        try:
            check_image(img_stream, self._max_pixels)
        except FetchError as error:
            return (None,) * 5 + (str(error),)
        image, *sizes, message = super().__call__(img_stream, blurring_bbox_list)
        if message is not None:
            return (None,) * 5 + (f"{Reason.CORRUPT_IMAGE}: {message}",)
        self.num_bytes_out += len(image)
        return (image, *sizes, None)
