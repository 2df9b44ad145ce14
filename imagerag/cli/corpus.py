"""`imagerag ingest` and `imagerag reindex`: run the flows in this process."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from imagerag.cli.run import run_flow

if TYPE_CHECKING:
    from tasks.report import CorpusReport

UrlListArgument = Annotated[
    str,
    typer.Argument(
        metavar="IMAGES",
        help="A path (on a cluster, the same on every machine) or any fsspec URI of: a folder of images, including its "
        "subfolders but not hidden files; a list of image URLs with captions, as parquet, csv, tsv, json or jsonl, or "
        "of plain URLs, as txt; or a dataset with its images, as parquet, webdataset tars or a Lance table. A list is "
        "a file (also compressed, .gz or .zst), or a folder or glob of files.",
    ),
]
CaptionsOption = Annotated[
    str | None,
    typer.Option(
        help="Captions of a folder's images: parquet, csv, tsv, json or jsonl with a column of file names relative to "
        "the folder (`file`, `file_name`, `path`, `image`, ...) and one of captions. Images without a row, and rows "
        "without an image, are counted. Default: `metadata.csv` in the folder, or the text of `name.txt` next to "
        "`name.jpg`, or the words of the file name."
    ),
]
NameOption = Annotated[
    str | None, typer.Option(help="Name of the corpus, of its shards folder and its table. Default: `images`.")
]
EncoderOption = Annotated[
    str | None,
    typer.Option(help="Encoder: `tiny`, `ViT-H-14/laion2b_s32b_b79k`, `hf-hub:org/name@commit`, or a folder."),
]
UrlColumnOption = Annotated[str | None, typer.Option(help="Column of URLs or file names. Default: guessed.")]
CaptionColumnOption = Annotated[str | None, typer.Option(help="Column of captions. Default: guessed.")]
AllowHostOption = Annotated[
    list[str] | None, typer.Option(help="Host that may have a loopback or private address; repeatable.")
]
RetryOption = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Retry all failed URLs. Transient failures are retried anyway, in five runs at most.",
    ),
]
RefreshOption = Annotated[
    bool,
    typer.Option("--refresh", help="Ask servers whether images have changed (conditional requests), and fetch those."),
]
MaxShrinkOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Largest share of its rows that the table may lose. Default: 0.5."),
]
ParametersOption = Annotated[
    Path | None, typer.Option(help="JSON file with any of the flow's parameters, as the Prefect UI shows them.")
]


def flow_command(flow: Literal["ingest", "reindex"], help_text: str) -> Callable[..., None]:
    """Return the command of a flow; both flows have the same options."""

    def command(
        url_list: UrlListArgument,
        captions: CaptionsOption = None,
        name: NameOption = None,
        encoder: EncoderOption = None,
        url_column: UrlColumnOption = None,
        caption_column: CaptionColumnOption = None,
        allow_host: AllowHostOption = None,
        retry_failed: RetryOption = False,
        refresh: RefreshOption = False,
        max_shrink: MaxShrinkOption = None,
        parameters: ParametersOption = None,
    ) -> None:
        options: dict[str, Any] = {
            "url_list": url_list,
            "captions": captions,
            "name": name,
            "encoder": encoder,
            "columns": {"url": url_column, "caption": caption_column},
            "retry_failed": retry_failed or None,
            "refresh": refresh or None,
            "download": {"allowed_hosts": allow_host or None},
            "publish": {"max_shrink": max_shrink},
        }
        show_report(run_flow(flow, given(options), parameters))

    command.__doc__ = help_text
    return command


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


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return only the options that were set on the command line."""
    nested = {key: given(value) if isinstance(value, Mapping) else value for key, value in options.items()}
    return {key: value for key, value in nested.items() if value is not None}
