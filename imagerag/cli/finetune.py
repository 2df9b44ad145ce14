"""`imagerag finetune`: run the flow in this process."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagerag.cli.corpus import ParametersOption, given
from imagerag.cli.names import NameOption, corpus_name
from imagerag.cli.run import run_flow
from imagerag.errors import UserError

if TYPE_CHECKING:
    from tasks.report import FinetuneReport


class RecipeOption(StrEnum):
    """Recipe that gives the defaults of unset parameters."""

    TINY = "tiny"
    SD_TURBO = "sd_turbo"


RecipeChoice = Annotated[
    RecipeOption,
    typer.Option(help="Defaults for what is not given: minutes on a laptop, or the paper's values."),
]
BaseOption = Annotated[
    str | None, typer.Option(help="Student model: a hub id and commit, or a diffusers folder. Default: `tiny`.")
]
TeacherOption = Annotated[str | None, typer.Option(help="Multi-step teacher model, given like the student.")]


def finetune(
    name: NameOption = None,
    recipe: RecipeChoice = RecipeOption.TINY,
    base: BaseOption = None,
    teacher: TeacherOption = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Text file of captions to exclude from training. Default: 2 % of the captions.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed of the training.")] = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Number of training workers.")] = None,
    group: Annotated[str | None, typer.Option(help="Parent run in MLflow, for ablations.")] = None,
    anew: Annotated[
        bool,
        typer.Option(
            "--anew", help="Start on the published index instead of resuming a training on an earlier version."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate memory, time and checkpoint sizes.")
    ] = False,
    parameters: ParametersOption = None,
) -> None:
    """Train an adapter on an index."""
    options = {
        "name": corpus_name(name) if parameters is None else name,
        "data": {"base": base, "teacher": teacher, "held_out": None if held_out is None else str(held_out.absolute())},
        "training": {"steps": steps, "seed": seed},
        "workers": {"num_workers": num_workers},
        "group": group,
        "anew": anew,
        "dry_run": dry_run,
    }
    show_finetune(run_flow("finetune", given(options), parameters, defaults=recipe_parameters(recipe, base, teacher)))


def recipe_parameters(recipe: RecipeOption, base: str | None, teacher: str | None) -> dict[str, Any]:
    """Return the parameters of a recipe."""
    from imagerag.training import config

    if recipe is RecipeOption.TINY:
        return config.tiny().model_dump()
    if base is None or teacher is None:
        raise UserError("the recipe sd_turbo needs --base and --teacher: SD-Turbo and SD 2.1, by hub id or folder")
    return config.sd_turbo(base, teacher).model_dump()


def show_finetune(report: "FinetuneReport") -> None:
    """Print the result of a training, or its plan."""
    from rich.markdown import Markdown

    from imagerag.cli.terminal import PlainConsole

    if report.finetuned is None:
        PlainConsole().print(Markdown(report.plan.markdown()))
        return
    finetuned = report.finetuned
    what = f"trained {finetuned.num_steps:,} steps" if finetuned.is_new else "was trained before"
    typer.echo(f"the adapter for {report.name} {what}; validation score {finetuned.score:.4f}")
    typer.echo(f"adapter: {finetuned.uri}")
    typer.echo(f"compare: imagerag compare 'a red dragon' --name {report.name} --adapter {finetuned.uri}")
