"""Fine-tune: a published index with features becomes an adapter that uses it."""

from pydantic import Field, field_validator

from imagerag.config import Config
from imagerag.settings import DEFAULT_NAME, check_name
from imagerag.training import config
from imagerag.training.config import FinetuneConfig, SynthesizeConfig, TrainWorkersConfig
from imagerag.training.plan import Plan
from tasks.finetune import choose_version, plan_training, synthesize_examples, train_adapter
from tasks.parameters import flow_of
from tasks.policy import named_run
from tasks.report import FinetuneReport, write_finetune_report
from tasks.slots import compute_slot


class FinetuneParameters(Config):
    """What to learn from, and how; unset values are of the recipe `tiny`."""

    name: str = Field(default=DEFAULT_NAME, description="The corpus, which needs features of the base model.")
    data: SynthesizeConfig = Field(default=config.tiny().data, description="What is learnt from.")
    training: FinetuneConfig = Field(default=config.tiny().training, description="How it is learnt.")
    workers: TrainWorkersConfig = Field(default=TrainWorkersConfig(), description="On which machines.")
    group: str | None = Field(default=None, description="An MLflow run to nest this one's under, for ablations.")
    anew: bool = Field(
        default=False,
        description="Begin on the published index, even where a training with these parameters was begun on an earlier "
        "version and is not finished.",
    )
    dry_run: bool = Field(default=False, description="Only say what it would take.")

    _check_name = field_validator("name")(check_name)


@flow_of(FinetuneParameters)
def finetune(parameters: FinetuneParameters) -> FinetuneReport:
    """Train an adapter and LoRA for an index by latent adversarial distillation.

    Run it again at any time: it goes on with what was stopped, and redoes nothing that is done.
    """
    if parameters.dry_run:
        return FinetuneReport(name=parameters.name, plan=_plan(parameters)[1])
    with compute_slot(), named_run():
        version, plan = _plan(parameters)
        training_set = synthesize_examples(parameters.name, version, parameters.data)
        finetuned = train_adapter(training_set, parameters.training, parameters.workers, parameters.group)
    report = FinetuneReport(name=parameters.name, plan=plan, training_set=training_set, finetuned=finetuned)
    write_finetune_report(report)
    return report


def _plan(parameters: FinetuneParameters) -> tuple[int, Plan]:
    version = choose_version(parameters.name, parameters.data, parameters.training, anew=parameters.anew)
    return version, plan_training(parameters.name, version, parameters.data, parameters.training)
