"""The flow `finetune`: train an adapter on a published index with features."""

from flows.parameters import FinetuneParameters
from imagerag.training.plan import Plan
from tasks.finetune import choose_version, plan_training, synthesize_examples, train_adapter
from tasks.parameters import flow_of
from tasks.policy import named_run
from tasks.report import FinetuneReport, write_finetune_report
from tasks.slots import compute_slot


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
    version = choose_version(
        parameters.name, parameters.data, parameters.training, parameters.workers, anew=parameters.anew
    )
    return version, plan_training(parameters.name, version, parameters.data, parameters.training)
