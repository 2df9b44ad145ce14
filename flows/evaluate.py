"""Evaluate: a trained adapter is measured, registered, and made champion if it is better."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from imagerag.config import Config
from imagerag.evaluation.config import EvaluateConfig, GateConfig
from imagerag.registry.champion import present_champion
from imagerag.settings import DEFAULT_NAME, Settings, check_name
from imagerag.training.job import newest_finetuned, read_finetuned
from tasks.evaluate import evaluate_adapter, pass_gate, register_model
from tasks.parameters import flow_of
from tasks.policy import named_run
from tasks.report import EvaluateReport, write_evaluate_report
from tasks.slots import compute_slot


class EvaluateParameters(Config):
    """What to measure, and what to reach."""

    name: str = Field(default=DEFAULT_NAME, description="The corpus, with a published index.")
    adapter: str | None = Field(
        default=None, description="A folder that a training left; unset: that of the corpus's last training."
    )
    evaluation: EvaluateConfig = Field(default=EvaluateConfig(), description="What is generated and measured.")
    gate: GateConfig = Field(default=GateConfig(), description="What a candidate must reach to become champion.")
    portable: bool = Field(
        default=False, description="Pack the index into the model, for machines that can't reach the store."
    )
    keep_models: int = Field(
        default=10,
        ge=0,
        description="Registered versions that are kept beside those with an alias and those that people promoted or "
        "rolled back; older ones are removed, with what they keep of their index.",
    )

    _check_name = field_validator("name")(check_name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.gate.check(self.evaluation)
        return self


@flow_of(EvaluateParameters)
def evaluate(parameters: EvaluateParameters) -> EvaluateReport:
    """Compare an adapter with base model, teacher and champion; register it, and make it champion if it is better.

    Run it again at any time: pictures that are there are not made again, and nothing is registered twice.
    """
    settings = Settings()
    adapter = parameters.adapter
    with compute_slot(), named_run():
        finetuned = newest_finetuned(settings, parameters.name) if adapter is None else read_finetuned(adapter)
        champion = present_champion(settings, finetuned)
        evaluated = evaluate_adapter(finetuned, parameters.evaluation, parameters.gate, champion)
        decision = pass_gate(finetuned, evaluated, parameters.gate, champion)
        registered = register_model(
            finetuned, evaluated, decision, portable=parameters.portable, keep=parameters.keep_models
        )
    report = EvaluateReport(name=parameters.name, evaluated=evaluated, decision=decision, registered=registered)
    write_evaluate_report(report)
    return report
