"""`imagerag demo`: run the whole pipeline on the sample corpus."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from imagerag.evaluation.growth import Growth
    from imagerag.settings import Settings
    from tasks.report import PipelineReport

CORPUS = "sample"
NEIGHBOURS = 10
QUERIES = ("a slice of watermelon", "a happy puppy", "rainy day", "something to write with")
_STEPS = 100
"""Training steps, less than half of the recipe's."""
_DOWNLOAD = {
    "allowed_hosts": ["127.0.0.1"],
    "image_format": "webp",  # the format of the drawings, so that they are stored unchanged
    "timeout_s": 5,
    "shard_size": 500,
}


def demo(
    limit: Annotated[int | None, typer.Option(min=300, help="Maximum number of images to ingest.")] = None,
) -> None:
    """Run the whole pipeline on the sample corpus: from a list of URLs to a registered model, then add new images."""
    from imagerag.settings import Settings

    settings = Settings()
    typer.echo(f"All results are stored in {settings.home}. A second run skips what is done.\n")
    with _one_prefect(settings):
        _demo(settings, limit)


def _demo(settings: "Settings", limit: int | None) -> None:
    from imagerag.storage.files import read_json, write_json

    folder = settings.home / CORPUS
    done = read_json(f"{folder}/demo.json")
    if done is None:
        typer.echo("1. Serve the sample corpus on loopback, including URLs that must fail; download, embed,")
        typer.echo("   index, cache features, fine-tune, evaluate on held-out concepts, apply the gate, register.")
        report = _pipeline(settings, limit)
        done = {
            "version": report.evaluate.registered.version,
            "evaluation": report.evaluate.evaluated.uri,
            "adapter": report.evaluate.evaluated.adapter,
            "flow_run": report.flow_run_id,
        }
        write_json(f"{folder}/demo.json", done)
    else:
        typer.echo(f"1. The model exists already; delete {folder / 'demo.json'} to make it again.")

    typer.echo(f"\n2. Pull version {done['version']} of the model, as an application would.")
    model = _pull(settings, done["version"])
    typer.echo(f"   {model}")
    typer.echo(
        "\n3. Add a drawing style and new concepts to the index with `reindex`, and generate them without training."
    )
    _grow(settings, limit)
    growth = _compare(settings, model)
    if growth.before is not None and growth.after is not None:
        typer.echo(f"   recognised among {growth.before.num}: before {growth.before}, after {growth.after}")
    page = _write_page(settings, done, growth)
    typer.echo(f"\nSummary:    {page}")
    typer.echo(f"Search:     {_search(settings)}")
    typer.echo(f"Generate:   .venv/bin/imagerag generate 'a red dragon' --name {CORPUS} --adapter {done['adapter']}")
    typer.echo("UIs:        make up (this run is in Prefect's history, the model in MLflow)")


@contextmanager
def _one_prefect(settings: "Settings") -> Iterator[None]:
    """Start one Prefect server for all flows in the block, because each start takes seconds."""
    from imagerag.services import prefect_environment, prefect_server

    os.environ.update(prefect_environment(settings))
    with prefect_server(settings) as api_url:
        os.environ["IMAGERAG_PREFECT_API_URL"] = api_url
        yield


def _pipeline(settings: "Settings", limit: int | None) -> "PipelineReport":
    from imagerag.cli.evaluate import show_evaluation
    from imagerag.cli.run import run_flow
    from imagerag.embedded.sample.server import (
        SampleServer,
        remembered_port,
        write_held_out,
        write_prompts,
        write_url_list,
    )

    with SampleServer(port=remembered_port(settings.home)) as server:
        url_list = write_url_list(server, settings.home, limit=limit, later=False)
        options: dict[str, Any] = {
            "url_list": str(url_list),
            "name": CORPUS,
            "download": _DOWNLOAD,
            "data": {"held_out": str(write_held_out(settings.home))},
            "training": {"steps": _STEPS},
            "evaluation": {"prompts": str(write_prompts(settings.home))},
            # For a model this small, retrieval takes about as long as generation.
            "gate": {"max_slowdown": 3.0},
        }
        if limit is not None:  # there may be too few held-out concepts for recognition
            options["gate"]["metric"] = "text_score"
        report: PipelineReport = run_flow("pipeline", options, defaults=_defaults())
    from rich.markdown import Markdown

    from imagerag.cli.terminal import PlainConsole

    PlainConsole().print(Markdown(report.summary()))
    show_evaluation(report.evaluate)
    return report


def _defaults() -> dict[str, Any]:
    from imagerag.training import config

    return config.tiny().model_dump()


def _pull(settings: "Settings", version: int) -> Path:
    from imagerag.registry.fetch import pull

    out = settings.home / CORPUS / f"model-{version}"
    if not out.exists():
        pull(settings, str(version), out)
    return out


def _grow(settings: "Settings", limit: int | None) -> None:
    from imagerag.cli.corpus import show_report
    from imagerag.cli.features import show_features
    from imagerag.cli.run import run_flow
    from imagerag.embedded.sample.server import SampleServer, remembered_port, write_url_list

    with SampleServer(port=remembered_port(settings.home)) as server:
        url_list = write_url_list(server, settings.home, limit=limit)
        show_report(run_flow("reindex", {"url_list": str(url_list), "name": CORPUS, "download": _DOWNLOAD}))
    show_features(run_flow("features", {"name": CORPUS}))


def _compare(settings: "Settings", model: Path) -> "Growth":
    from imagerag.cli.quiet import quiet_models

    quiet_models()
    from imagerag.embedded.sample.server import later_concepts
    from imagerag.evaluation.growth import measure_growth
    from imagerag.generation.pipeline import ImageRAGTurboPipeline

    pipeline = ImageRAGTurboPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [concept.name for concept in later_concepts()]
    return measure_growth(pipeline, settings.index_uri, CORPUS, prompts)


def _write_page(settings: "Settings", done: dict[str, Any], growth: "Growth") -> Path:
    from imagerag.evaluation.compare_page import render_comparisons
    from imagerag.evaluation.results import PAGE, read_results
    from imagerag.processes import find
    from imagerag.retrieval.search import Retriever
    from imagerag.services import PREFECT, mlflow_link
    from imagerag.storage.files import write_file

    results = read_results(done["evaluation"])
    links = {"images of held-out concepts in every way, with their references": f"{done['evaluation']}/{PAGE}"}
    notes = results.notes()
    if server := find(settings.home, PREFECT):
        links["the run in Prefect"] = f"{server.url}/runs/flow-run/{done['flow_run']}"
    else:
        notes.insert(0, f"The run in Prefect: `make up`, and at its address /runs/flow-run/{done['flow_run']}.")
    place = f"models/{settings.model_name}/versions/{done['version']}"
    if link := mlflow_link(settings, place):
        links["the model in MLflow"] = link
    else:
        notes.insert(0, f"The model in MLflow: `make up`, and at its address /#/{place}.")
    tables = [("The model on held-out concepts", list(results.rows()))]
    if growth.before is not None and growth.after is not None:
        head = ["", f"recognised among {growth.before.num}"]
        rows = [head, ["before", str(growth.before)], ["after", str(growth.after)]]
        tables.append(("New concepts, before and after they were added to the index, without training", rows))
    html = render_comparisons(
        "evaluate.html",
        growth.comparisons,
        Retriever(settings.index_uri, CORPUS),
        title="imagerag demo: the sample corpus",
        tables=tables,
        notes=notes,
        links=links,
    )
    page = settings.home / CORPUS / "demo.html"
    write_file(str(page), html.encode())
    return page


def _search(settings: "Settings") -> Path:
    from imagerag.cli.search import Mode, open_index, search_text
    from imagerag.retrieval.page import Section, write_page
    from imagerag.retrieval.search import Filters

    retriever, encoder = open_index(settings, CORPUS)
    sections = [
        Section(query, search_text(retriever, encoder, query, NEIGHBOURS, Mode.CAPTION, Filters())) for query in QUERIES
    ]
    page = settings.home / CORPUS / "search.html"
    write_page(page, title="imagerag search: the sample corpus", sections=sections)
    return page
