"""The flow `reindex`: make the published index match its folder or list."""

from flows.ingest import update_corpus
from flows.parameters import CorpusParameters
from tasks.parameters import flow_of
from tasks.report import CorpusReport


@flow_of(CorpusParameters)
def reindex(parameters: CorpusParameters) -> CorpusReport:
    """Make a corpus match a folder or list exactly: fetch and embed new and changed images, remove missing ones.

    Other rows stay unchanged.
    """
    return update_corpus(parameters, mode="replace")
