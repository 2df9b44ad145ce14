"""The task `features`: table rows to cached features."""

from prefect import get_run_logger

from imagerag.artifacts import CachedFeatures
from imagerag.hspace.cache import cache_features
from imagerag.hspace.config import FeaturesConfig
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from tasks.policy import stage
from tasks.progress import StageProgress


@stage("features")
def make_features(name: str, config: FeaturesConfig) -> CachedFeatures:
    """Compute the features of a base model for every row of the table `name`."""
    settings = Settings()
    with StageProgress("features", "rows") as on_progress:
        result = cache_features(Store(settings.index_uri, name), config, settings, on_progress)
    logger = get_run_logger()
    if result.num_added == 0:
        logger.info("nothing to encode: all %s rows have their features", f"{result.num_rows:,}")
    else:
        logger.info("encoded %s of %s rows with %s", result.num_added, result.num_rows, result.base_id)
    return result
