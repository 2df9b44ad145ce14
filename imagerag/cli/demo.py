"""`imagerag demo`: the main job, on the sample corpus, with every engine real."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from imagerag.settings import Settings
    from tasks.report import CorpusReport, FinetuneReport

CORPUS = "sample"
NEIGHBOURS = 10
QUERIES = ("a slice of watermelon", "a happy puppy", "rainy day", "something to write with")
PROMPTS = ("a llama", "a doughnut", "a helicopter", "a castle", "a harp", "an eggplant")
"""All in the index, and none of them among the concepts that anything was trained on."""


def demo(
    limit: Annotated[int | None, typer.Option(min=1, help="Ingest only so many images.")] = None,
) -> None:
    """Run the main job on the sample corpus: ingest, search, cache features, fine-tune, and generate with the index."""
    from imagerag.settings import Settings

    settings = Settings()
    typer.echo(f"Everything this makes is kept in {settings.home}. Run it again: what is done is skipped.\n")
    typer.echo("1. Serve the sample corpus on loopback, as a web site would, bad URLs included; ingest its URL list.")
    report = _ingest(settings, limit)

    from imagerag.cli.corpus import show_report

    show_report(report)
    typer.echo("\n2. Search the published index.")
    page = _search(settings)
    typer.echo("\n3. Encode every row with the base model `tiny`, so that references cost next to nothing later.")
    _cache_features()
    typer.echo("\n4. Fine-tune an adapter on all but the held-out concepts; losses and pictures go to MLflow.")
    adapter = _finetune(settings, limit)
    typer.echo("\n5. Generate held-out concepts in one step, with and without references, and compare.")
    comparison = _compare(settings, adapter)
    typer.echo(f"\nPictures:   {comparison}")
    typer.echo(f"Search:     {page}")
    typer.echo(f"Generate:   .venv/bin/imagerag generate 'a red dragon' --name {CORPUS} --adapter {adapter}")
    typer.echo(f"            .venv/bin/imagerag search 'a birthday party' --name {CORPUS} --html birthday.html")
    typer.echo("Prefect UI: make up (this run is in its history)")


def _ingest(settings: "Settings", limit: int | None) -> "CorpusReport":
    from imagerag.cli.run import run_flow
    from imagerag.corpus.sample.server import SampleServer, remembered_port, write_url_list

    with SampleServer(port=remembered_port(settings.home)) as server:
        url_list = write_url_list(server, settings.home, limit=limit)
        options = {
            "url_list": str(url_list),
            "name": CORPUS,
            # WebP, as the drawings are served, so that they are kept as they are.
            "download": {"allowed_hosts": ["127.0.0.1"], "image_format": "webp", "timeout_s": 5, "shard_size": 500},
        }
        report: CorpusReport = run_flow("ingest", options)
        return report


def _search(settings: "Settings") -> Path:
    from imagerag.cli.search import Mode, open_index, print_neighbours, search_text
    from imagerag.retrieval.page import Section, write_page
    from imagerag.retrieval.search import Filters

    retriever, encoder = open_index(settings, CORPUS)
    sections = []
    for query in QUERIES:
        neighbours = search_text(retriever, encoder, query, NEIGHBOURS, Mode.CAPTION, Filters())
        print_neighbours(query, neighbours)
        sections.append(Section(query, neighbours))
    page = settings.home / CORPUS / "search.html"
    write_page(page, title="imagerag search: the sample corpus", sections=sections)
    return page


def _cache_features() -> None:
    from imagerag.cli.features import show_features
    from imagerag.cli.run import run_flow

    show_features(run_flow("features", {"name": CORPUS}))


def _finetune(settings: "Settings", limit: int | None) -> Path:
    from imagerag.cli.finetune import show_finetune
    from imagerag.cli.run import run_flow
    from imagerag.corpus.sample.server import write_held_out

    held_out = {"held_out": str(write_held_out(settings.home))} if limit is None else {"held_out_share": 0.2}
    report: FinetuneReport = run_flow("finetune", {"name": CORPUS, "data": held_out})
    show_finetune(report)
    assert report.finetuned is not None, report
    return Path(report.finetuned.uri)


def _compare(settings: "Settings", adapter: Path) -> Path:
    from imagerag.cli.compare import print_scores, run_comparison

    out = settings.home / CORPUS / "compare"
    made = run_comparison(PROMPTS, name=CORPUS, base="tiny", teacher="tiny-teacher", adapter=adapter, seed=0, out=out)
    print_scores(made)
    return out / "index.html"
