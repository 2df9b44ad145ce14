"""The flow `evaluate`: measure a trained adapter, register it, and make it champion if the gate passes."""

from flows.parameters import EvaluateParameters
from imagerag.registry.champion import present_champion
from imagerag.registry.promotion import champion_version
from imagerag.settings import settings_of
from imagerag.training.finetune import newest_finetuned, read_finetuned
from tasks.evaluate import evaluate_adapter, pass_gate, register_model
from tasks.parameters import flow_of
from tasks.policy import named_run
from tasks.report import EvaluateReport, write_evaluate_report
from tasks.slots import compute_slot


@flow_of(EvaluateParameters)
def evaluate(parameters: EvaluateParameters) -> EvaluateReport:
    """Compare an adapter with base model, teacher and champion; register it, and make it champion if the gate passes.

    A second run reuses existing pictures and registers nothing twice.
    """
    settings = settings_of(parameters.model_name)
    adapter = parameters.adapter
    with compute_slot(), named_run():
        finetuned = newest_finetuned(settings, parameters.name) if adapter is None else read_finetuned(adapter)
        over = champion_version(settings)
        champion = present_champion(settings, finetuned)
        evaluated = evaluate_adapter(finetuned, parameters.evaluation, parameters.gate, champion)
        decision = pass_gate(finetuned, evaluated, parameters.gate, champion, parameters.model_name)
        registered = register_model(
            finetuned,
            evaluated,
            decision,
            over=over,
            model_name=parameters.model_name,
            portable=parameters.portable,
            keep=parameters.keep_models,
        )
    report = EvaluateReport(name=parameters.name, evaluated=evaluated, decision=decision, registered=registered)
    write_evaluate_report(report)
    return report
