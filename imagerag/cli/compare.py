"""`imagerag compare`: generate pictures with and without references, side by side."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagerag.cli.generate import (
    DEFAULT_BASE,
    AdapterOption,
    BaseOption,
    PromptFileOption,
    PromptsArgument,
    ScaleOption,
    check_alone,
    check_scale,
    open_model,
    open_pipeline,
    read_prompts,
)
from imagerag.cli.names import NameOption, corpus_name
from imagerag.errors import UserError
from imagerag.limits import check_seeds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imagerag.evaluation.compare import Comparison
    from imagerag.generation.pipeline import ImageRAGTurboPipeline


def compare(
    prompts: PromptsArgument = None,
    prompt_file: PromptFileOption = None,
    name: NameOption = None,
    base: BaseOption = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Registered model, with its own adapter and index, as in `imagerag generate`; repeatable."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Multi-step model to compare with. Default: `tiny-teacher` for `tiny`, otherwise none."),
    ] = None,
    adapter: AdapterOption = None,
    scale: ScaleOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise, which is the same for all pictures.")] = 0,
    out: Annotated[Path, typer.Option(help="Output folder: index.html, grid.png and scores.json.")] = Path("compare"),
) -> None:
    """Write a page of pictures by the base model, slerp, slerp with the best w, the adapter, and the teacher."""
    wanted = read_prompts(prompts or [], prompt_file)
    check_seeds(seed)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is a folder; {out} is a file")
    models = list(dict.fromkeys(model or []))
    check_alone(models, base=base, adapter=adapter, name=name)
    check_scale(scale, has_adapter=bool(adapter or models))
    base = base or DEFAULT_BASE
    if teacher is None and base == DEFAULT_BASE and not models:
        teacher = "tiny-teacher"
    with ExitStack() as stack:
        if models:
            scaled = "" if scale is None else f", scale = {scale:g}"
            opened = {f"model {each}{scaled}": stack.enter_context(open_model(each)) for each in models}
            pipeline = next(iter(opened.values()))
        else:
            from imagerag.settings import Settings

            opened = {}
            pipeline = open_pipeline(base, adapter).use_index(Settings().index_uri, corpus_name(name))
        comparisons = run_comparison(wanted, pipeline, opened, teacher=teacher, scale=scale, seed=seed, out=out)
    print_scores(comparisons)
    typer.echo(f"page: {out / 'index.html'}")


def run_comparison(
    prompts: "Sequence[str]",
    pipeline: "ImageRAGTurboPipeline",
    models: "Mapping[str, ImageRAGTurboPipeline]",
    *,
    teacher: str | None,
    scale: float | None,
    seed: int,
    out: Path,
) -> "list[Comparison]":
    """Compare a pipeline with an index, and registered models, on prompts, and write the pages to `out`."""
    from imagerag.settings import Settings

    with_many_steps = None if teacher is None else open_pipeline(teacher, None)
    from tqdm import tqdm

    from imagerag.evaluation.compare import Comparer
    from imagerag.evaluation.compare_page import write_comparison
    from imagerag.evaluation.scorer import Scorer

    assert pipeline.index is not None
    retriever = pipeline.index.retriever
    name = retriever.name
    cache = Settings().home / "compare" / name / f"scorer-{retriever.version}.npz"
    if not cache.exists():
        typer.echo("fitting the score to the index's pictures, once for this version of it …", err=True)
    comparer = Comparer(pipeline, with_many_steps, Scorer.of(retriever, cache), seed=seed, scale=scale, models=models)
    made = list(tqdm(comparer.compare(prompts), total=len(prompts), unit=" prompts", disable=None))
    indexes = {title: each.index.retriever for title, each in models.items() if each.index is not None}
    title = f"imagerag compare: {pipeline.config.base_id} with {name}"
    write_comparison(out, made, retriever, indexes, title=title)
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
