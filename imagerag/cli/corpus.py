"""`imagerag ingest` and `imagerag reindex`: run the flows in this process."""

from typing import TYPE_CHECKING

import typer

from imagerag.cli.run import run_flow

if TYPE_CHECKING:
    from tasks.report import CorpusReport


def ingest(context: typer.Context) -> None:
    """Add a folder of images, or a list of URLs, to a corpus: download, embed, publish."""
    show_report(run_flow("ingest", context.obj))


def reindex(context: typer.Context) -> None:
    """Make a corpus match a folder or list exactly: add new images, remove missing ones."""
    show_report(run_flow("reindex", context.obj))


def show_report(report: "CorpusReport") -> None:
    """Print the report of a run as a table."""
    from rich.table import Table

    from imagerag.cli.terminal import PlainConsole

    table = Table(title=f"corpus {report.name}", show_header=False, title_justify="left")
    for row in report.rows():
        table.add_row(row["figure"], row["value"])
    for reason, count in sorted(report.download.reasons.items()):
        examples = report.download.examples.get(reason, ())
        table.add_row(f"failed: {reason}", "\n".join([f"{count:,}", *(f"  {example}" for example in examples)]))
    PlainConsole().print(table)
