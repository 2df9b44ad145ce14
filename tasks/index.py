"""The task `index`: table rows to an index with measured recall."""

from prefect import get_run_logger

from imagerag.artifacts import CachedFeatures, Embedded, IndexBuild
from imagerag.retrieval.config import IndexConfig
from imagerag.retrieval.index import build_index
from imagerag.retrieval.store import Store
from tasks.policy import stage
from tasks.progress import StageProgress


@stage("index")
def index_rows(rows: Embedded | CachedFeatures, config: IndexConfig) -> IndexBuild:
    """Index the newest version of the table, and measure recall@10."""
    with StageProgress("index", "steps") as on_progress:
        result = build_index(Store(rows.uri, rows.table), config, on_progress)
    get_run_logger().info("index of version %s: %s, recall@10 %.3f", result.version, result.kind, result.recall_at_10)
    return result
