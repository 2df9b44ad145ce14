"""The flow `ingest`: build a published, searchable index of a folder of images or a list of image URLs."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from imagerag.config import Config
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.source import check_source
from imagerag.corpus.url_list import BadRows, UrlColumns
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.encoder_files import check_spec
from imagerag.errors import UserError
from imagerag.retrieval.index import IndexConfig
from imagerag.retrieval.publish import PublishConfig, published_rows
from imagerag.retrieval.store import Store
from imagerag.settings import DEFAULT_NAME, Settings, check_name
from tasks.download import download_images
from tasks.embed import embed_images
from tasks.index import index_rows
from tasks.parameters import flow_of
from tasks.policy import alone_at
from tasks.publish import publish_index
from tasks.report import CorpusReport, write_report


class CorpusParameters(Config):
    """Parameters of `ingest` and `reindex`."""

    url_list: str = Field(
        title="Folder or URL list",
        description="A path or any fsspec URI of: a folder of images; a list of image URLs with captions, as parquet, "
        "csv, tsv, json or jsonl, or of plain URLs, as txt; or a dataset with its images, as parquet, webdataset tars "
        "or a Lance table. A list is a file (also compressed, .gz or .zst), or a folder or glob of files.",
    )
    name: str = Field(default=DEFAULT_NAME, description="Name of the corpus, of its shards folder and its table.")
    captions: str | None = Field(
        default=None,
        description="Captions of a folder's images: a table of file names and captions, as parquet, csv, tsv, json or "
        "jsonl. Unset: `metadata.csv` in the folder, or the text of `name.txt` next to `name.jpg`, or the words of "
        "the file name.",
    )
    columns: UrlColumns = Field(
        default=UrlColumns(), description="Columns of the list or the captions table; unset columns are guessed."
    )
    bad_rows: BadRows = Field(
        default=BadRows(), description="How to treat unusable rows of the list or the captions table."
    )
    encoder: str = Field(
        default="tiny",
        description="Encoder: `tiny`, an open_clip name and tag (`ViT-B-32/openai`), `hf-hub:org/name@commit`, or a "
        "folder.",
    )
    retry_failed: bool = Field(
        default=False,
        description="Retry all URLs that failed in earlier runs. Transient failures (no connection, a busy server, "
        "...) are retried anyway, in five runs at most.",
    )
    refresh: bool = Field(
        default=False,
        description="Ask servers whether images have changed, by conditional requests (ETag, Last-Modified), and fetch "
        "those that have. Off: fetched URLs are not requested again.",
    )
    download: DownloadConfig = Field(default=DownloadConfig(), description="How to fetch images.")
    embed: EmbedConfig = Field(default=EmbedConfig(), description="How to embed images and captions.")
    index: IndexConfig = Field(default=IndexConfig(), description="How to build the index.")
    publish: PublishConfig = Field(
        default=PublishConfig(), description="Checks that a version must pass to be published."
    )

    _check_name = field_validator("name")(check_name)
    _check_encoder = field_validator("encoder")(check_spec)

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        check_source(self.url_list, self.captions)
        return self


class NotPublishedError(UserError):
    """The new version failed its checks; readers keep the version that was published before."""


@flow_of(CorpusParameters)
def ingest(parameters: CorpusParameters) -> CorpusReport:
    """Add a folder of images, or a list of image URLs, to a corpus: download, embed, index, publish.

    A second run continues unfinished work and skips finished work.
    """
    return update_corpus(parameters, mode="add")


def update_corpus(parameters: CorpusParameters, mode: Literal["add", "replace"]) -> CorpusReport:
    """Run the stages with images that are added to the corpus (`add`) or that replace its contents (`replace`)."""
    with alone_at(parameters.name):
        report = _update(parameters, mode)
    publication = report.publication
    if not publication.published:
        failed = [f"{check.name}: {check.detail}" for check in publication.checks if not check.passed]
        raise NotPublishedError(f"{parameters.name} is not published: {'; '.join(failed)}")
    return report


def _update(parameters: CorpusParameters, mode: Literal["add", "replace"]) -> CorpusReport:
    rows_before = published_rows(Store(Settings().index_uri, parameters.name))
    download = download_images(
        parameters.url_list,
        parameters.captions,
        parameters.columns,
        parameters.bad_rows,
        parameters.name,
        parameters.download,
        mode,
        parameters.retry_failed,
        parameters.refresh,
    )
    max_shrink = parameters.publish.max_shrink
    embedded = embed_images(download, parameters.name, parameters.encoder, parameters.embed, max_shrink)
    index = index_rows(embedded, parameters.index)
    publication = publish_index(index, parameters.publish)
    report = CorpusReport(
        name=parameters.name,
        rows_before=rows_before,
        download=download,
        embedded=embedded,
        index=index,
        publication=publication,
    )
    write_report(report)
    return report
