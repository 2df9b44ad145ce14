"""`imagerag evaluate` and `imagerag pipeline`: run the flows in this process."""

from typing import TYPE_CHECKING

import typer

from imagerag.cli.finetune import RecipeChoice, RecipeOption, recipe_parameters
from imagerag.cli.names import NameOption, with_name
from imagerag.cli.run import run_flow

if TYPE_CHECKING:
    from tasks.report import EvaluateReport


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
    from rich.markdown import Markdown
    from rich.table import Table

    from imagerag.cli.terminal import PlainConsole
    from imagerag.evaluation.results import PAGE, read_results

    console, results = PlainConsole(), read_results(report.evaluated.uri)
    head, *rows = ([*row[:-1]] for row in results.rows())  # the page has the split of the latency
    table = Table(title=f"{results.base} with {results.index}", title_justify="left")
    for title in head:
        table.add_column(title)
    for row in rows:
        table.add_row(*(cell.replace(" [", "\n[") for cell in row))
    console.print(table)
    for note in results.notes():
        console.print(note)
    console.print(Markdown(report.decision.markdown()))
    typer.echo(f"{report.registered.uri} is {'champion' if report.decision.passed else 'a candidate'}")
    typer.echo(f"page: {report.evaluated.uri}/{PAGE}")
