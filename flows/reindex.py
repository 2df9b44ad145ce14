"""Re-index: the published index follows its folder or list."""

from flows.ingest import CorpusParameters, update_corpus
from tasks.parameters import flow_of
from tasks.report import CorpusReport


@flow_of(CorpusParameters)
def reindex(parameters: CorpusParameters) -> CorpusReport:
    """Make a corpus exactly its folder or list: fetch and embed what is new or changed, drop what is gone.

    Nothing else is touched.
    """
    return update_corpus(parameters, mode="replace")
