"""`imagerag compare`: pictures with and without references, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagerag.cli.generate import BaseOption, ScaleOption, check_scale, open_pipeline, read_prompts
from imagerag.cli.names import NameOption, corpus_name
from imagerag.errors import UserError
from imagerag.limits import check_seeds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagerag.evaluation.compare import Comparison


def compare(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to make pictures of.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    name: NameOption = None,
    base: BaseOption = "tiny",
    teacher: Annotated[
        str | None, typer.Option(help="The multi-step model to compare with; `tiny-teacher` for `tiny`, else none.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="The folder of an adapter, or its URI.")] = None,
    scale: ScaleOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, which is the same everywhere.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder to write to: index.html, grid.png and scores.json.")] = Path(
        "compare"
    ),
) -> None:
    """Make a page of pictures: the base model, slerp, the best w of slerp, the adapter if there is one, the teacher."""
    wanted = read_prompts(prompts or [], prompt_file)
    check_seeds(seed)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is a folder; {out} is a file")
    check_scale(scale, adapter)
    if teacher is None and base == "tiny":
        teacher = "tiny-teacher"
    comparisons = run_comparison(
        wanted, name=corpus_name(name), base=base, teacher=teacher, adapter=adapter, scale=scale, seed=seed, out=out
    )
    print_scores(comparisons)
    typer.echo(f"page: {out / 'index.html'}")


def run_comparison(
    prompts: "Sequence[str]",
    *,
    name: str,
    base: str,
    teacher: str | None,
    adapter: str | None,
    scale: float | None,
    seed: int,
    out: Path,
) -> "list[Comparison]":
    """Make the comparisons, and write them to `out`."""
    from imagerag.settings import Settings, check_name

    settings = Settings()
    pipeline = open_pipeline(base, adapter).use_index(settings.index_uri, check_name(name))
    with_many_steps = None if teacher is None else open_pipeline(teacher, None)
    from tqdm import tqdm

    from imagerag.evaluation.compare import Comparer
    from imagerag.evaluation.compare_page import write_comparison
    from imagerag.evaluation.scorer import Scorer

    assert pipeline.index is not None
    retriever = pipeline.index.retriever
    cache = settings.home / "compare" / name / f"scorer-{retriever.version}.npz"
    if not cache.exists():
        typer.echo("fitting the score to the index's pictures, once for this version of it …", err=True)
    comparer = Comparer(pipeline, with_many_steps, Scorer.of(retriever, cache), seed=seed, scale=scale)
    made = list(tqdm(comparer.compare(prompts), total=len(prompts), unit=" prompts", disable=None))
    write_comparison(out, made, retriever, title=f"imagerag compare: {base} with {name}")
    return made


def print_scores(comparisons: "Sequence[Comparison]") -> None:
    """Print the mean score and time of each column."""
    from rich.table import Table

    from imagerag.cli.terminal import PlainConsole

    table = Table(title=f"mean of {len(comparisons)} prompts", title_justify="left")
    for column in ("", "score", "ms"):
        table.add_column(column, justify="left" if not column else "right")
    for number, cell in enumerate(comparisons[0].cells):
        cells = [comparison.cells[number] for comparison in comparisons]
        score, seconds = (
            sum(values) / len(cells) for values in zip(*((c.score, c.seconds) for c in cells), strict=True)
        )
        table.add_row(cell.title, f"{score:.3f}", f"{1000 * seconds:.0f}")
    PlainConsole().print(table)
