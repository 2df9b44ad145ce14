"""`imagerag evaluate` and `imagerag pipeline`: run the flows in this process."""

from typing import TYPE_CHECKING

import typer

from imagerag.cli.finetune import RecipeChoice, RecipeOption, recipe_parameters
from imagerag.cli.names import NameOption, with_name
from imagerag.cli.run import run_flow

if TYPE_CHECKING:
    from tasks.report import EvaluateReport

_WIDE = 150
"""Characters that a table of all metrics takes with their intervals."""


def evaluate(context: typer.Context, name: NameOption = None) -> None:
    """Measure an adapter, register it as a model, and make it champion if the gate passes."""
    show_evaluation(run_flow("evaluate", with_name(context.obj, name)))


def pipeline(context: typer.Context, recipe: RecipeChoice = RecipeOption.TINY) -> None:
    """Run everything from a folder of images or a list of URLs to a champion: ingest, features, finetune, evaluate.

    Stages that are done are skipped.
    """
    from rich.markdown import Markdown

    from imagerag.cli.terminal import PlainConsole

    report = run_flow("pipeline", context.obj, defaults=recipe_parameters(recipe, context.obj))
    PlainConsole().print(Markdown(report.markdown()))


def show_evaluation(report: "EvaluateReport") -> None:
    """Print the results of an evaluation and the gate's decision."""
    from rich.box import SIMPLE_HEAD
    from rich.markdown import Markdown
    from rich.table import Table

    from imagerag.cli.terminal import PlainConsole
    from imagerag.evaluation.results import PAGE, read_results

    console, results = PlainConsole(), read_results(report.evaluated.uri)
    rows = [row[:-1] for row in results.rows()]  # the page has the split of the latency
    table = Table(title=f"{results.base} with {results.index}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    is_wide = console.width >= _WIDE
    if is_wide:
        cells = [[cell.replace(" [", "\n[") for cell in row] for row in rows]
    else:  # a column per way, without the intervals, which are on the page
        cells = [[cell.partition(" [")[0] for cell in column] for column in zip(*rows, strict=True)]
    for number, title in enumerate(cells[0]):
        table.add_column(
            title, overflow="fold", min_width=10 if number == 0 else 5, max_width=None if is_wide or number == 0 else 7
        )
    for own in cells[1:]:
        table.add_row(*own)
    console.print(table)
    for note in results.notes():
        console.print(note)
    console.print(Markdown(report.decision.markdown()))
    typer.echo(f"{report.registered.uri} is {'champion' if report.registered.is_champion else 'a candidate'}")
    typer.echo(f"page: {report.evaluated.uri}/{PAGE}")
