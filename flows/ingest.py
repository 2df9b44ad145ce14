"""Ingest: a folder of images, or a list of image URLs, becomes a published, searchable index."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from imagerag.config import Config
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.source import check_source
from imagerag.corpus.url_list import BadRows, UrlColumns
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.spec import check_spec
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
    """What to index, and how."""

    url_list: str = Field(
        title="Folder or URL list",
        description="On any fsspec path: a folder of images; image URLs with captions, as parquet, csv, tsv, json or "
        "jsonl, or URLs alone as txt; or a dataset with its images, as parquet, webdataset tars or a Lance table. A "
        "list is a file, also packed (.gz, .zst), or a folder or a glob of them.",
    )
    name: str = Field(default=DEFAULT_NAME, description="Names the corpus: its shards folder and its table.")
    captions: str | None = Field(
        default=None,
        description="Of a folder's images: a table of file names and captions, as parquet, csv, tsv, json or jsonl. "
        "Unset: its `metadata.csv`, or what `name.txt` beside `name.jpg` says, else the words of the file's name.",
    )
    columns: UrlColumns = Field(
        default=UrlColumns(), description="Columns of the list or of the captions; unset ones are guessed."
    )
    bad_rows: BadRows = Field(
        default=BadRows(), description="What happens to rows of the list or of the captions that can't be used."
    )
    encoder: str = Field(
        default="tiny",
        description="`tiny`, an open_clip name and tag (`ViT-B-32/openai`), `hf-hub:org/name@commit`, or a folder.",
    )
    retry_failed: bool = Field(
        default=False,
        description="Try again all that failed in earlier runs. What may pass (no connection, a busy server, ...) is "
        "tried again anyway, in five runs at most.",
    )
    refresh: bool = Field(
        default=False,
        description="Ask every URL whether its picture is another one by now, by what its server said of it before "
        "(ETag, Last-Modified). Off, what was fetched is not asked for again.",
    )
    download: DownloadConfig = Field(default=DownloadConfig(), description="How images are fetched.")
    embed: EmbedConfig = Field(default=EmbedConfig(), description="How images and captions are embedded.")
    index: IndexConfig = Field(default=IndexConfig(), description="How the index is built.")
    publish: PublishConfig = Field(default=PublishConfig(), description="What a version must pass to be published.")

    _check_name = field_validator("name")(check_name)
    _check_encoder = field_validator("encoder")(check_spec)

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        check_source(self.url_list, self.captions)
        return self


class NotPublishedError(UserError):
    """The new version failed its checks: readers stay on the version that they see."""


@flow_of(CorpusParameters)
def ingest(parameters: CorpusParameters) -> CorpusReport:
    """Add a folder of images, or a list of image URLs, to a corpus: download, embed, index, publish.

    Run it again at any time: it continues what is unfinished and redoes nothing that is done.
    """
    return update_corpus(parameters, mode="add")


def update_corpus(parameters: CorpusParameters, mode: Literal["add", "replace"]) -> CorpusReport:
    """Run the stages on images that are added to the corpus, or that from now on are the corpus."""
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
