"""Images downloaded a second, beside plain img2dataset on the same list; and from a server with a limit."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from imagerag.corpus.config import DownloadConfig
from tests.bench.corpus import HOST, make_shards, serving, write_drawings, write_url_list
from tests.bench.harness import Row, Scale, alternate, in_fresh_process, median

BAR = 1.0
LIMITED_BAR = 1.1
RATE = 100
"""URLs a second that the server with a limit answers."""

Download = Callable[[Path, Path, DownloadConfig], None]


@dataclass(frozen=True)
class Size:
    """How much to download how often."""

    num_urls: int
    shard_size: int
    repetitions: int
    num_limited: int
    """URLs of the server with a limit."""


SIZES: dict[Scale, Size] = {"small": Size(400, 100, 1, 800), "full": Size(5000, 500, 7, 9000)}


@dataclass(frozen=True)
class Timing:
    """How long one download took, in seconds."""

    whole: float
    """From the start of the interpreter to its end."""
    fetching: float
    """From the start of the first shard to the end of the last one, as img2dataset's own statistics have it."""


def run(scale: Scale, folder: Path) -> list[Row]:
    """Download one list with either, in turn; and one from a server with a limit."""
    size = SIZES[scale]
    files = write_drawings(folder / "drawings")
    return [*_friendly(size, files, folder), *_limited(size, files, folder)]


def _friendly(size: Size, files: list[tuple[str, str]], folder: Path) -> list[Row]:
    config = DownloadConfig(allowed_hosts=(HOST,), shard_size=size.shard_size)
    with serving(folder / "drawings") as base_url:
        url_list = folder / "urls.parquet"
        write_url_list(url_list, base_url, files, range(size.num_urls))
        ours, peer = alternate(
            size.repetitions,
            partial(_time, _download_ours, url_list, folder / "ours", config),
            partial(_time, _download_plainly, url_list, folder / "peer", config),
        )

    def row(what: str, ours_s: list[float], peer_s: list[float]) -> Row:
        return Row(
            what=what,
            unit="images/s",
            ours=size.num_urls / median(ours_s),
            peer=size.num_urls / median(peer_s),
            peer_name=f"img2dataset {version('img2dataset')}",
            at_least=BAR,
        )

    return [
        row(
            f"{size.num_urls:,} URLs, without start-up (first shard's start to last shard's end)",
            [timing.fetching for timing in ours],
            [timing.fetching for timing in peer],
        ),
        row(
            f"{size.num_urls:,} URLs, whole process",
            [timing.whole for timing in ours],
            [timing.whole for timing in peer],
        ),
    ]


def _limited(size: Size, files: list[tuple[str, str]], folder: Path) -> list[Row]:
    """The server answers so many URLs in any second, and the others by 429."""
    config = DownloadConfig(allowed_hosts=(HOST,), shard_size=size.shard_size)
    with serving(folder / "drawings", RATE) as base_url:
        url_list = folder / "limited.parquet"
        write_url_list(url_list, base_url, files, range(size.num_limited))
        plainly = _num_fetched(_download_plainly, url_list, folder / "plainly", config)
        timing = _time(_download_ours, url_list, folder / "patiently", config)  # nothing may fail
    return [
        Row(
            what=f"{size.num_limited:,} URLs of a server that answers 429 above {RATE} a second: those that succeed",
            unit="images",
            ours=size.num_limited,
            peer=max(plainly, 1),
            peer_name=f"img2dataset {version('img2dataset')}",
            at_least=BAR,
        ),
        Row(
            what="the same: time, without start-up",
            unit="s",
            ours=timing.fetching,
            peer=size.num_limited / RATE,
            peer_name="what the rate allows",
            at_most=LIMITED_BAR,
        ),
    ]


def _num_fetched(download: Download, url_list: Path, folder: Path, config: DownloadConfig) -> int:
    in_fresh_process(download, url_list, folder, config)
    return sum(json.loads(path.read_text())["successes"] for path in folder.rglob("*_stats.json"))


def _time(download: Download, url_list: Path, folder: Path, config: DownloadConfig) -> Timing:
    _, whole = in_fresh_process(download, url_list, folder, config)
    stats = [json.loads(path.read_text()) for path in folder.rglob("*_stats.json")]
    assert all(shard["successes"] == shard["count"] for shard in stats), "the bench's own server failed"
    shutil.rmtree(folder)
    return Timing(whole, max(shard["end_time"] for shard in stats) - min(shard["start_time"] for shard in stats))


def _download_ours(url_list: Path, folder: Path, config: DownloadConfig) -> None:
    make_shards([url_list], folder, config)


def _download_plainly(url_list: Path, folder: Path, config: DownloadConfig) -> None:
    """Download with img2dataset alone, set as `imagerag.corpus.fetch` sets it."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import img2dataset

    img2dataset.download(
        url_list=str(url_list),
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        output_folder=str(folder),
        output_format="webdataset",
        processes_count=os.cpu_count(),
        thread_count=config.thread_count,
        number_sample_per_shard=config.shard_size,
        image_size=config.image_size,
        resize_mode="keep_ratio_largest",
        resize_only_if_bigger=True,
        encode_format=config.image_format,
        encode_quality=95,
        skip_reencode=True,
        extract_exif=False,
        compute_hash="sha256",
        timeout=config.timeout_s,
        retries=config.retries,
        disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
    )
