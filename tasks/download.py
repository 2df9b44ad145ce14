"""The task `download`: images of a folder or a URL list to webdataset shards."""

from typing import Literal

from prefect import get_run_logger

from imagerag.artifacts import Download
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.download import download
from imagerag.corpus.source import read_images
from imagerag.corpus.url_list import BadRows, UrlColumns
from imagerag.settings import Settings
from tasks.policy import stage
from tasks.progress import StageProgress


@stage("download")
def download_images(
    url_list: str,
    captions: str | None,
    columns: UrlColumns,
    bad_rows: BadRows,
    name: str,
    config: DownloadConfig,
    mode: Literal["add", "replace"],
    retry_failed: bool,
    refresh: bool,
) -> Download:
    """Fetch the images that the corpus `name` lacks."""
    settings, logger = Settings(), get_run_logger()
    with StageProgress("read", "images") as on_progress:
        urls = read_images(url_list, captions, columns, on_progress, bad_rows)
    if urls.num_invalid:
        logger.warning("%s bad rows: %s", f"{urls.num_invalid:,}", "; ".join(urls.invalid))
    if urls.num_named_by_file:
        logger.warning("%s images have no caption but the words of their file names", f"{urls.num_named_by_file:,}")
    with StageProgress("download", "URLs") as on_progress:
        result = download(
            urls,
            corpus=Corpus(settings.shards_of(name)),
            config=config,
            settings=settings,
            mode=mode,
            retry_failed=retry_failed,
            refresh=refresh,
            on_progress=on_progress,
        )
    if result.num_fetched == 0:
        logger.info("nothing to download: all %s URLs were settled before", f"{result.num_urls:,}")
    else:
        logger.info(
            "tried %s URLs; in all %s fine, %s failed", result.num_fetched, result.num_success, result.num_failed
        )
    return result
