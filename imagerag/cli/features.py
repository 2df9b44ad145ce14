"""`imagerag features`: run the flow in this process."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from imagerag.cli.corpus import ParametersOption, given
from imagerag.cli.names import NameOption, corpus_name
from imagerag.cli.run import run_flow

if TYPE_CHECKING:
    from tasks.report import FeaturesReport


class FitOption(StrEnum):
    """How an image of any shape is fitted into the base model's square."""

    AUTO = "auto"
    PAD = "pad"
    CROP = "crop"


def features(
    name: NameOption = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model: `tiny`, a hub id and commit (`org/name@<commit>`), or a diffusers folder."),
    ] = None,
    fit: Annotated[
        FitOption | None,
        typer.Option(
            help="How images are made square: `crop` to the middle, `pad` with the colour of the border, or `auto`, "
            "which pads images with a transparent or single-coloured border and crops the others. Default: the "
            "index's setting, initially `auto`. A change encodes all rows again."
        ),
    ] = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Number of workers, each with a model.")] = None,
    parameters: ParametersOption = None,
) -> None:
    """Compute the cached features of an index for a base model; only rows without features are encoded."""
    how = {"base": base, "fit": None if fit is None else fit.value, "num_workers": num_workers}
    options = {"name": corpus_name(name) if parameters is None else name, "features": how}
    show_features(run_flow("features", given(options), parameters))


def show_features(report: "FeaturesReport") -> None:
    """Print how many rows were encoded, and the published version."""
    cached = report.cached
    rate = f", {cached.num_added / cached.duration_s:,.1f}/s" if cached.num_added else ""
    typer.echo(f"features of {report.name} for {cached.base_id}, fit {cached.fit}: {cached.num_added:,} encoded{rate}")
    typer.echo(f"readers see version {report.publication.version}, {report.publication.num_rows:,} rows")
