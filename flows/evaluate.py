"""The flow `evaluate`: measure a trained adapter, register it, and make it champion if the gate passes."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from imagerag.config import Config
from imagerag.evaluation.config import EvaluateConfig, GateConfig
from imagerag.registry.champion import present_champion
from imagerag.settings import DEFAULT_NAME, check_name, settings_of
from imagerag.training.finetune import newest_finetuned, read_finetuned
from tasks.evaluate import evaluate_adapter, pass_gate, register_model
from tasks.parameters import flow_of
from tasks.policy import named_run
from tasks.report import EvaluateReport, write_evaluate_report
from tasks.slots import compute_slot


class EvaluateParameters(Config):
    """Parameters of `evaluate`."""

    name: str = Field(default=DEFAULT_NAME, description="Name of the corpus; it needs a published index.")
    adapter: str | None = Field(
        default=None, description="Folder or URI of a trained adapter; unset: the corpus's last training."
    )
    evaluation: EvaluateConfig = Field(default=EvaluateConfig(), description="What to generate and measure.")
    gate: GateConfig = Field(default=GateConfig(), description="Conditions for a candidate to become champion.")
    model_name: str | None = Field(
        default=None, description="Registered model in MLflow; unset: the setting IMAGERAG_MODEL_NAME."
    )
    portable: bool = Field(
        default=False, description="Pack a copy of the index into the model, for machines that can't reach the store."
    )
    keep_models: int = Field(
        default=10,
        ge=0,
        description="Number of registered versions to keep, in addition to versions with an alias and versions that "
        "people promoted or rolled back; older ones are removed, and no longer keep their version of the index.",
    )

    _check_name = field_validator("name")(check_name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.gate.check(self.evaluation)
        settings_of(self.model_name)
        return self


@flow_of(EvaluateParameters)
def evaluate(parameters: EvaluateParameters) -> EvaluateReport:
    """Compare an adapter with base model, teacher and champion; register it, and make it champion if the gate passes.

    A second run reuses existing pictures and registers nothing twice.
    """
    settings = settings_of(parameters.model_name)
    adapter = parameters.adapter
    with compute_slot(), named_run():
        finetuned = newest_finetuned(settings, parameters.name) if adapter is None else read_finetuned(adapter)
        champion = present_champion(settings, finetuned)
        evaluated = evaluate_adapter(finetuned, parameters.evaluation, parameters.gate, champion)
        decision = pass_gate(finetuned, evaluated, parameters.gate, champion, parameters.model_name)
        registered = register_model(
            finetuned,
            evaluated,
            decision,
            model_name=parameters.model_name,
            portable=parameters.portable,
            keep=parameters.keep_models,
        )
    report = EvaluateReport(name=parameters.name, evaluated=evaluated, decision=decision, registered=registered)
    write_evaluate_report(report)
    return report
