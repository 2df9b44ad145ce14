"""The flow `ingest`: build a published, searchable index of a folder of images or a list of image URLs."""

from typing import Literal

from flows.parameters import CorpusParameters
from imagerag.artifacts import Publication
from imagerag.errors import UserError
from imagerag.retrieval.publish import published_rows
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from tasks.download import download_images
from tasks.embed import embed_images
from tasks.index import index_rows
from tasks.parameters import flow_of
from tasks.policy import alone_at
from tasks.publish import publish_index
from tasks.report import CorpusReport, write_report


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
    check_published(parameters.name, report.publication)
    return report


def check_published(name: str, publication: Publication) -> None:
    """Check that a new version was published.

    Raises:
        NotPublishedError: if it failed its checks.
    """
    if not publication.published:
        failed = [f"{check.name}: {check.detail}" for check in publication.checks if not check.passed]
        raise NotPublishedError(f"{name} is not published: {'; '.join(failed)}")


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
