"""`imagerag features`: run the flow in this process."""

from typing import TYPE_CHECKING

import typer

from imagerag.cli.names import NameOption, with_name
from imagerag.cli.run import run_flow

if TYPE_CHECKING:
    from tasks.report import FeaturesReport


def features(context: typer.Context, name: NameOption = None) -> None:
    """Compute the cached features of an index for a base model; only rows without features are encoded."""
    show_features(run_flow("features", with_name(context.obj, name)))


def show_features(report: "FeaturesReport") -> None:
    """Print how many rows were encoded, and the published version."""
    cached = report.cached
    rate = f", {cached.num_added / cached.duration_s:,.1f}/s" if cached.num_added else ""
    typer.echo(f"features of {report.name} for {cached.base_id}, fit {cached.fit}: {cached.num_added:,} encoded{rate}")
    typer.echo(f"readers see version {report.publication.version}, {report.publication.num_rows:,} rows")
