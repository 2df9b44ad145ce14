"""`imagerag finetune`: what it refuses before anything starts, and what it makes of a recipe."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.parameters import FinetuneParameters
from imagerag.cli import app
from imagerag.cli.finetune import RecipeOption, recipe_parameters
from imagerag.cli.run import merged
from imagerag.config import validated
from imagerag.errors import UserError
from imagerag.training import config
from imagerag.training.config import FinetuneConfig

COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "parameters", "fault"),
    [
        (["--recipe", "sd_turbo"], "{}", "the recipe sd_turbo needs --base and --teacher"),
        (["--recipe", "sd_turbo"], '{"data": 3}', "the recipe sd_turbo needs --base and --teacher"),
        (["--recipe", "sd_turbo", "--base", "sd-turbo", "--teacher", "sd"], "{}", "a base model is"),
        (["--base", "sd-turbo"], "{}", "a base model is"),
        (["--name", "A b"], "{}", "a corpus name has 1 to 63 characters"),
        ([], '{"training": {"batch_size": 30}}', "multiple of micro_batch_size, got 30 and 32"),
        ([], '{"training": {"references": {"none": 0.9, "random": 0.9}}}', "must not exceed 1"),
        ([], '{"training": {"references": {"number": 0}, "lora_rank": 0}}', "there is nothing to train"),
        (
            [],
            '{"training": {"losses": {"adversarial": 0, "distillation": 0, "perceptual": 0}}}',
            "all loss weights are 0",
        ),
        (
            [],
            '{"training": {"losses": {"distillation": 0, "perceptual": 0}, "adversarial_share": 0.5}}',
            "adversarial_share must be 1 but is 0.5",
        ),
        ([], '{"training": {"learning_rate": -1}}', "learning_rate: Input should be greater than 0; got -1"),
        ([], '{"training": {"epochs": 3}}', "training.epochs: Extra inputs are not permitted; got 3"),
    ],
)
def test_what_breaks_a_rule_is_refused(tmp_path: Path, arguments: list[str], parameters: str, fault: str) -> None:
    path = tmp_path / "parameters.json"
    path.write_text(parameters)
    with pytest.raises(UserError, match=fault):
        CliRunner().invoke(app, ["finetune", *arguments, "--parameters", str(path)], catch_exceptions=False)


def test_the_papers_recipe_has_the_papers_figures() -> None:
    models = {"base": f"stabilityai/sd-turbo@{COMMIT}", "teacher": f"stabilityai/sd-2-1@{COMMIT}"}
    given = {"name": "catalogue", "data": models, "training": {"seed": 3}}
    parameters = validated(FinetuneParameters, merged(recipe_parameters(RecipeOption.SD_TURBO, given), given))
    training, data = parameters.training, parameters.data
    assert {"base": data.base, "teacher": data.teacher} == models
    assert (training.learning_rate, training.batch_size, training.steps, training.seed) == (1e-5, 2_048, 20_000, 3)
    assert (training.losses.distillation, training.losses.perceptual) == (2.5, 1.0)
    assert training.max_timestep is None
    assert (data.num_teacher_latents, data.guidance_scale) == (3_000_000, 7.5)


def test_a_recipes_warm_up_leaves_a_few_steps_something_to_learn() -> None:
    """A single step at the rate 0, with which a warm-up begins, would train nothing."""

    def of(**training: int) -> FinetuneConfig:
        given = {"training": training}
        return validated(FinetuneParameters, merged(recipe_parameters(RecipeOption.TINY, given), given)).training

    assert [of(steps=steps).warmup_steps for steps in (1, 2, 12, 13, 240)] == [0, 1, 11, 12, 12]
    assert of(steps=8, warmup_steps=500).warmup_steps == 7
    assert FinetuneConfig(steps=8).warmup_steps == 7
    assert FinetuneConfig().warmup_steps == 500


def test_without_a_recipe_the_flow_has_that_of_tiny() -> None:
    parameters = FinetuneParameters()
    assert (parameters.data, parameters.training) == (config.tiny().data, config.tiny().training)
