"""Re-index: the published index follows its folder or list."""

from prefect import flow

from flows.ingest import CorpusParameters, update_corpus
from tasks.report import CorpusReport


@flow(name="reindex", flow_run_name="reindex {parameters.name}")
def reindex(parameters: CorpusParameters) -> CorpusReport:
    """Make a corpus exactly its folder or list: fetch and embed what is new or changed, drop what is gone.

    Nothing else is touched.
    """
    return update_corpus(parameters, mode="replace")
