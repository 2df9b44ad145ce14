"""`imagerag features`: the flow, run here and now."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from imagerag.cli.corpus import ParametersOption, given
from imagerag.cli.names import NameOption, corpus_name
from imagerag.cli.run import run_flow

if TYPE_CHECKING:
    from tasks.report import FeaturesReport


class FitOption(StrEnum):
    """How a picture of any shape becomes the base model's square."""

    AUTO = "auto"
    PAD = "pad"
    CROP = "crop"


def features(
    name: NameOption = None,
    base: Annotated[
        str | None,
        typer.Option(help="`tiny`, a hub id and commit (`org/name@<commit>`), or a diffusers folder."),
    ] = None,
    fit: Annotated[
        FitOption | None,
        typer.Option(
            help="What is shown of a picture that is no square: its middle (`crop`), all of it on the colour of its "
            "border (`pad`), or all of it where its border is transparent or of one colour (`auto`). Not given: as "
            "before, at first `auto`. Another one encodes all rows anew."
        ),
    ] = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Models at work at a time.")] = None,
    parameters: ParametersOption = None,
) -> None:
    """Make the cached features of an index for a base model: only rows that have none are encoded."""
    how = {"base": base, "fit": None if fit is None else fit.value, "num_workers": num_workers}
    options = {"name": corpus_name(name) if parameters is None else name, "features": how}
    show_features(run_flow("features", given(options), parameters))


def show_features(report: "FeaturesReport") -> None:
    """Print what a run did."""
    cached = report.cached
    rate = f", {cached.num_added / cached.duration_s:,.1f}/s" if cached.num_added else ""
    typer.echo(f"features of {report.name} for {cached.base_id}, fit {cached.fit}: {cached.num_added:,} encoded{rate}")
    typer.echo(f"readers see version {report.publication.version}, {report.publication.num_rows:,} rows")
