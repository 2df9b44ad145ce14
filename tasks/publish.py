"""A measured index to what readers see."""

from prefect import get_run_logger

from imagerag.artifacts import IndexBuild, Publication
from imagerag.retrieval.publish import PublishConfig, publish
from imagerag.retrieval.store import Store
from tasks.policy import stage


@stage("publish")
def publish_index(index: IndexBuild, config: PublishConfig) -> Publication:
    """Move the readers' tag to the new version if its checks pass."""
    result = publish(Store(index.uri, index.table), index, config)
    logger = get_run_logger()
    for check in result.checks:
        if not check.passed:
            logger.error("not published: %s: %s", check.name, check.detail)
    return result
