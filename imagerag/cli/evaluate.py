"""`imagerag evaluate` and `imagerag pipeline`: run the flows in this process."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagerag.cli.corpus import CaptionsOption, EncoderOption, ParametersOption, UrlListArgument, given
from imagerag.cli.finetune import BaseOption, RecipeChoice, RecipeOption, TeacherOption, recipe_parameters
from imagerag.cli.names import ModelNameOption, NameOption, corpus_name
from imagerag.cli.run import run_flow

if TYPE_CHECKING:
    from tasks.report import EvaluateReport


def evaluate(
    name: NameOption = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder or URI that `imagerag finetune` wrote. Default: the last training's."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file: a prompt per line, optionally a tab and a category. Default: held-out captions."),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=2, help="Maximum number of prompts.")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric that the gate decides by. Default: `recognised`.")] = None,
    model_name: ModelNameOption = None,
    portable: Annotated[bool, typer.Option("--portable", help="Pack a copy of the index into the model.")] = False,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Number of workers, each with a model.")] = None,
    parameters: ParametersOption = None,
) -> None:
    """Measure an adapter, register it as a model, and make it champion if the gate passes."""
    options = {
        "name": corpus_name(name) if parameters is None else name,
        "adapter": adapter if adapter is None or "://" in adapter else str(Path(adapter).absolute()),
        "evaluation": {
            "prompts": None if prompts is None else str(prompts.absolute()),
            "num_prompts": num_prompts,
            "num_workers": num_workers,
        },
        "gate": {"metric": metric},
        "model_name": model_name,
        "portable": portable,
    }
    show_evaluation(run_flow("evaluate", given(options), parameters))


def pipeline(
    url_list: UrlListArgument,
    captions: CaptionsOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the corpus. Default: `images`.")] = None,
    encoder: EncoderOption = None,
    recipe: RecipeChoice = RecipeOption.TINY,
    base: BaseOption = None,
    teacher: TeacherOption = None,
    model_name: ModelNameOption = None,
    parameters: ParametersOption = None,
) -> None:
    """Run everything from a folder of images or a list of URLs to a champion: ingest, features, finetune, evaluate.

    Stages that are done are skipped.
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
        "model_name": model_name,
    }
    report = run_flow("pipeline", given(options), parameters, defaults=recipe_parameters(recipe, base, teacher))
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
