"""The tasks of the flow `finetune`: a published index with features to a trained adapter."""

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact

from imagerag.artifacts import Finetuned, TrainingSet
from imagerag.retrieval.publish import require_published
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training.config import FinetuneConfig, SynthesizeConfig, TrainWorkersConfig
from imagerag.training.examples import Examples
from imagerag.training.finetune import finetune
from imagerag.training.plan import Plan, plan
from imagerag.training.resume import version_to_learn_from
from imagerag.training.synthesize import synthesize
from tasks.policy import stage
from tasks.progress import StageProgress

_LONGEST_DAYS = 30
"""The paper trains for a week."""


@stage("version")
def choose_version(
    name: str, data: SynthesizeConfig, training: FinetuneConfig, workers: TrainWorkersConfig, *, anew: bool
) -> int:
    """Return the version of the index to train on, and log a warning if it is not the published one."""
    settings = Settings()
    version = version_to_learn_from(name, data, training, workers.dtype, settings, anew=anew)
    published = require_published(Store(settings.index_uri, name))
    if version != published:
        get_run_logger().warning(
            "goes on with the training that was begun on version %s of the index, which is kept for it; version %s is "
            "published now: `anew` (--anew) begins on that",
            version,
            published,
        )
    return version


@stage("plan")
def plan_training(name: str, index_version: int, data: SynthesizeConfig, training: FinetuneConfig) -> Plan:
    """Estimate the training's memory, steps and time, and create an artifact with them."""
    settings = Settings()
    examples = Examples(Retriever(settings.index_uri, name, version=index_version), data, settings.training_of(name))
    made = plan(examples, training)
    create_markdown_artifact(
        f"# {name}: what the training takes\n\n{made.markdown()}",
        key=f"plan-{name.replace('_', '-')}",
        description="Memory, steps and time, before anything starts",
    )
    return made


@stage("synthesize", timeout_days=_LONGEST_DAYS)
def synthesize_examples(name: str, index_version: int, config: SynthesizeConfig) -> TrainingSet:
    """Make the training set: latents and references."""
    with StageProgress("synthesize", "rows") as on_progress:
        result = synthesize(name, config, Settings(), on_progress, index_version=index_version)
    logger = get_run_logger()
    if result.num_added == 0:
        logger.info("nothing to make: all latents and references are there")
    else:
        logger.info("made %s rows of latents and references", f"{result.num_added:,}")
    return result


@stage("train", timeout_days=_LONGEST_DAYS)
def train_adapter(
    training_set: TrainingSet, config: FinetuneConfig, workers: TrainWorkersConfig, group: str | None
) -> Finetuned:
    """Train the adapter, or resume an interrupted training."""
    with StageProgress("train", "steps") as on_progress:
        result = finetune(training_set, config, workers, Settings(), on_progress, group=group)
    logger = get_run_logger()
    if result.is_new:
        logger.info("trained %s steps; validation score %.4f", result.num_steps, result.score)
    else:
        logger.info("nothing to train: %s was finished before", result.name)
    return result
