"""`imagerag ingest` and `imagerag reindex`: the flows, run here and now."""

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
        help="At a path (on a cluster: the same on every machine) or any fsspec URI: a folder of images, with all that "
        "is in it but hidden files; image URLs with captions, as parquet, csv, tsv, json or jsonl, or URLs alone as "
        "txt; or a dataset with its images: parquet, webdataset tars, a Lance table. A list is a file (also packed, "
        ".gz or .zst), or a folder or a glob of them.",
    ),
]
CaptionsOption = Annotated[
    str | None,
    typer.Option(
        help="Of a folder's images: parquet, csv, tsv, json or jsonl with a column of file names, counted from the "
        "folder (`file`, `file_name`, `path`, `image`, ...), and one of captions. Images without a "
        "row, and rows without an image, are counted. Not given: `metadata.csv` in the folder, or the text of "
        "`name.txt` beside `name.jpg`, or the words of the file's name."
    ),
]
NameOption = Annotated[
    str | None, typer.Option(help="Names the corpus: its shards folder and its table; `images` if not given.")
]
EncoderOption = Annotated[
    str | None, typer.Option(help="`tiny`, `ViT-H-14/laion2b_s32b_b79k`, `hf-hub:org/name@commit`, or a folder.")
]
UrlColumnOption = Annotated[str | None, typer.Option(help="The column of URLs or file names; guessed if not given.")]
CaptionColumnOption = Annotated[str | None, typer.Option(help="The column of captions; guessed if not given.")]
AllowHostOption = Annotated[
    list[str] | None, typer.Option(help="A host that may lie on loopback or in a private network; can be repeated.")
]
RetryOption = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Try again all that failed in earlier runs; what may pass is tried again anyway, in five runs at most.",
    ),
]
RefreshOption = Annotated[
    bool,
    typer.Option("--refresh", help="Ask every URL whether its picture changed; its server says so without sending it."),
]
MaxShrinkOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="The largest share by which the table may shrink; 0.5 if not given."),
]
ParametersOption = Annotated[
    Path | None, typer.Option(help="A JSON file with any of the flow's parameters, as the Prefect UI shows them.")
]


def flow_command(flow: Literal["ingest", "reindex"], help_text: str) -> Callable[..., None]:
    """Make the command of a flow; both flows take the same parameters."""

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
    """Print what a run did."""
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
    """The options that were given on the command line, and only those."""
    nested = {key: given(value) if isinstance(value, Mapping) else value for key, value in options.items()}
    return {key: value for key, value in nested.items() if value is not None}
