"""`imagerag tiny`: measure the shipped base model."""

from pathlib import Path
from typing import Annotated

import typer

from imagerag.errors import UserError

app = typer.Typer(help="The base model that ships with the package.", no_args_is_help=True)
_BEGIN, _END = "<!-- tiny:begin -->", "<!-- tiny:end -->"


@app.callback()
def _group() -> None:
    pass


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Output folder of report.md, report.json and image grids.")] = Path(
        "report"
    ),
    pictures: Annotated[int, typer.Option(min=120, help="Number of images per model and split.")] = 498,
    photos: Annotated[
        Path | None, typer.Option(help="Folder of other images, named by what they show, to rebuild from their h.")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Text file in which to replace the report between its two marks.")
    ] = None,
) -> None:
    """Measure the shipped teacher and student on training concepts and on held-out concepts."""
    if readme is not None:
        _read(readme)  # fail before a measurement that takes minutes
    from imagerag.recipes.tiny_base.report import make_report

    tables = make_report(out, pictures, photos).markdown()
    typer.echo(tables)
    typer.echo(f"written to {out}, with an image grid per model and split")
    if readme is not None:
        text = _read(readme)
        before, after = text.split(_BEGIN)[0], text.split(_END)[1]
        readme.write_text(f"{before}{_BEGIN}\n{tables}{_END}{after}", encoding="utf-8")


def _read(readme: Path) -> str:
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--readme has to be a readable text; {readme}: {error}") from error
    if text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise UserError(f"--readme has to have one {_BEGIN} and one {_END}; {readme} has not")
    return text
