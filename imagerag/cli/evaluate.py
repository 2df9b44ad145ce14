"""`imagerag evaluate` and `imagerag pipeline`: the flows, run here and now."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagerag.cli.corpus import CaptionsOption, EncoderOption, ParametersOption, UrlListArgument, given
from imagerag.cli.finetune import BaseOption, RecipeChoice, RecipeOption, TeacherOption, recipe_parameters
from imagerag.cli.names import NameOption, corpus_name
from imagerag.cli.run import run_flow

if TYPE_CHECKING:
    from tasks.report import EvaluateReport


def evaluate(
    name: NameOption = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="What `imagerag finetune` wrote, a folder or URI; of the last training if not given."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file with a prompt on each line, a tab and its category; else what was held out."),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=2, help="At most so many.")] = None,
    metric: Annotated[str | None, typer.Option(help="By which the gate decides; `recognised` if not given.")] = None,
    portable: Annotated[bool, typer.Option("--portable", help="Pack the index into the model.")] = False,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Models at work at a time.")] = None,
    parameters: ParametersOption = None,
) -> None:
    """Measure an adapter, register it as a model, and make it champion if it is better than what there is."""
    options = {
        "name": corpus_name(name) if parameters is None else name,
        "adapter": adapter if adapter is None or "://" in adapter else str(Path(adapter).absolute()),
        "evaluation": {
            "prompts": None if prompts is None else str(prompts.absolute()),
            "num_prompts": num_prompts,
            "num_workers": num_workers,
        },
        "gate": {"metric": metric},
        "portable": portable,
    }
    show_evaluation(run_flow("evaluate", given(options), parameters))


def pipeline(
    url_list: UrlListArgument,
    captions: CaptionsOption = None,
    name: Annotated[str | None, typer.Option(help="The corpus; `images` if not given.")] = None,
    encoder: EncoderOption = None,
    recipe: RecipeChoice = RecipeOption.TINY,
    base: BaseOption = None,
    teacher: TeacherOption = None,
    parameters: ParametersOption = None,
) -> None:
    """Make a champion of a folder of images, or of a list of URLs: ingest, features, finetune, evaluate.

    What is done is skipped.
    """
    from rich.markdown import Markdown

    from imagerag.cli.terminal import PlainConsole

    options = {
        "url_list": url_list,
        "captions": captions,
        "name": name,
        "encoder": encoder,
        "features": {"base": base},
        "data": {"base": base, "teacher": teacher},
    }
    report = run_flow("pipeline", given(options), parameters, defaults=recipe_parameters(recipe, base, teacher))
    PlainConsole().print(Markdown(report.markdown()))


def show_evaluation(report: "EvaluateReport") -> None:
    """Print what a run found."""
    from rich.markdown import Markdown
    from rich.table import Table

    from imagerag.cli.terminal import PlainConsole
    from imagerag.evaluation.results import PAGE, read_results

    console, results = PlainConsole(), read_results(report.evaluated.uri)
    head, *rows = ([*row[:-1]] for row in results.rows())  # the split of the time is on the page
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
