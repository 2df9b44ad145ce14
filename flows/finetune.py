"""The flow `finetune`: train an adapter on a published index with features."""

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
    """Parameters of `finetune`; defaults are those of the recipe `tiny`."""

    name: str = Field(default=DEFAULT_NAME, description="Name of the corpus; it needs features of the base model.")
    data: SynthesizeConfig = Field(default=config.tiny().data, description="Training data.")
    training: FinetuneConfig = Field(default=config.tiny().training, description="Optimisation.")
    workers: TrainWorkersConfig = Field(default=TrainWorkersConfig(), description="Training workers.")
    group: str | None = Field(default=None, description="Parent MLflow run of this training's run, for ablations.")
    anew: bool = Field(
        default=False,
        description="Start a new training on the published index, even if an unfinished training with these parameters "
        "exists for an earlier version.",
    )
    dry_run: bool = Field(default=False, description="Only estimate memory, steps and time.")

    _check_name = field_validator("name")(check_name)


@flow_of(FinetuneParameters)
def finetune(parameters: FinetuneParameters) -> FinetuneReport:
    """Train an adapter and LoRA for an index by latent adversarial distillation.

    A second run resumes an interrupted training and skips finished work.
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
