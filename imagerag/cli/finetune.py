"""`imagerag finetune`: run the flow in this process."""

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagerag.cli.names import NameOption, with_name
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
    typer.Option(help="Defaults for what is not given: minutes on a laptop, as shown here, or the paper's values."),
]


def finetune(context: typer.Context, name: NameOption = None, recipe: RecipeChoice = RecipeOption.TINY) -> None:
    """Train an adapter on an index."""
    given = with_name(context.obj, name)
    show_finetune(run_flow("finetune", given, defaults=recipe_parameters(recipe, given)))


def recipe_parameters(recipe: RecipeOption, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a recipe.

    Raises:
        UserError: if the recipe needs models that are not given.
    """
    from imagerag.training import config

    if recipe is RecipeOption.TINY:
        return config.tiny().model_dump()
    data = given.get("data")
    if not isinstance(data, Mapping) or not {"base", "teacher"} <= data.keys():
        raise UserError("the recipe sd_turbo needs --base and --teacher: SD-Turbo and SD 2.1, by hub id or folder")
    return config.sd_turbo("tiny", "tiny-teacher").model_dump()  # the given models replace these


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
