"""The task `embed`: webdataset shards to table rows."""

from prefect import get_run_logger

from imagerag.artifacts import Download, Embedded
from imagerag.corpus.corpus import Corpus
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.embed import embed
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from tasks.policy import stage
from tasks.progress import StageProgress


@stage("embed")
def embed_images(download: Download, name: str, encoder: str, config: EmbedConfig, max_shrink: float) -> Embedded:
    """Update the table `name` to exactly the corpus's successfully downloaded images."""
    settings = Settings()
    with StageProgress("embed", "images") as on_progress:
        result = embed(
            corpus=Corpus(download.uri),
            store=Store(settings.index_uri, name),
            encoder=encoder,
            config=config,
            settings=settings,
            on_progress=on_progress,
            max_shrink=max_shrink,
        )
    logger = get_run_logger()
    if result.num_added == 0 and result.num_removed == 0:
        logger.info("nothing to embed: the table holds all %s rows", f"{result.num_rows:,}")
    else:
        logger.info("added %s rows, removed %s; now %s", result.num_added, result.num_removed, result.num_rows)
    return result
