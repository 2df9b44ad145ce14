"""The options that are made from the models of the flows' parameters."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from flows.parameters import PARAMETERS
from imagerag.cli import app
from imagerag.cli.options import _NAMES, FlowCommand

TYPED = {
    "ingest": "captions name encoder url-column caption-column allow-host retry-failed refresh max-shrink parameters",
    "features": "name base fit num-workers parameters",
    "finetune": "name recipe base teacher held-out steps seed num-workers group anew dry-run parameters",
    "evaluate": "name adapter prompts num-prompts metric model-name portable num-workers parameters",
    "pipeline": "captions name encoder recipe base teacher model-name parameters",
}
"""What people type in scripts, and what `--help` therefore has to show."""


def paths(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from paths(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description or ""


def given(flow: str, *arguments: str) -> Any:
    """What a command's function is given of the command line."""

    def run(context: typer.Context) -> None:
        typer.echo(json.dumps(context.obj))

    one = typer.Typer()
    one.command(flow, cls=FlowCommand)(run)
    result = CliRunner().invoke(one, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def helped(flow: str, option: str) -> str:
    result = CliRunner().invoke(app, [flow, option], env={"COLUMNS": "2000"}, catch_exceptions=False)
    return result.output


@pytest.mark.parametrize("flow", PARAMETERS)
def test_every_parameter_is_an_option_with_its_description(flow: str) -> None:
    text = helped(flow, "--help-all")
    for path, description in paths(PARAMETERS[flow]):
        if path not in ("url_list", "name"):
            assert f"--{_NAMES.get(path, path).replace('_', '-')} " in text, path
            assert description in text, path


@pytest.mark.parametrize("flow", TYPED)
def test_help_shows_what_people_type_and_not_the_rest(flow: str) -> None:
    text = helped(flow, "--help")
    assert {option for option in TYPED[flow].split() if f"--{option} " not in text} == set()
    assert "--help-all" in text
    assert f"--{'publish.keep' if flow in ('ingest', 'features', 'pipeline') else 'gate'}" not in text


def test_every_short_name_is_of_a_parameter() -> None:
    assert _NAMES.keys() - {path for model in PARAMETERS.values() for path, _ in paths(model)} == set()


def test_options_are_nested_as_in_the_model_and_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "parameters.json"
    file.write_text('{"training": {"steps": 1, "seed": 2}, "portable": true}')
    assert given(
        "pipeline", "mine", "--base", "tiny", "--steps", "7", "--training.losses.adversarial", "0.5",
        "--evaluation.slerp-ws", "0", "--evaluation.slerp-ws", "1", "--no-download.respect-opt-out", "--refresh",
        "--parameters", str(file),
    ) == {
        "url_list": "mine",
        "portable": True,
        "refresh": True,
        "features": {"base": "tiny"},
        "data": {"base": "tiny"},
        "training": {"steps": 7, "seed": 2, "losses": {"adversarial": 0.5}},
        "evaluation": {"slerp_ws": [0.0, 1.0]},
        "download": {"respect_opt_out": False},
    }  # fmt: skip
    assert given("ingest", "mine") == {"url_list": "mine"}, "what is not given keeps the flow's default"


def test_a_value_out_of_bounds_is_refused_by_the_options_name() -> None:
    result = CliRunner().invoke(app, ["ingest", "list.csv", "--download.retries", "-1"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "Invalid value for '--download.retries'" in result.output
