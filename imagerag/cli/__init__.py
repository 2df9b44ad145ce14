"""The command line `imagerag`: everything that can be done without the Prefect UI.

This package is the composition root: the only part of `imagerag` that may import `flows`. Each command imports what it
needs when it runs, so that `imagerag --help` is fast.
"""

import gc
import sys

import typer

from imagerag.cli import (
    compare,
    corpus,
    demo,
    deploy,
    doctor,
    evaluate,
    features,
    finetune,
    generate,
    index,
    purge,
    registry,
    sample,
    search,
    services,
    settings,
    submit,
    tiny,
)
from imagerag.errors import UserError
from imagerag.plain import printable

app = typer.Typer(
    name="imagerag",
    help="Index your images, and generate new ones with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command("ingest")(
    corpus.flow_command("ingest", "Add a folder of images, or a list of URLs, to a corpus: download, embed, publish.")
)
app.command("reindex")(
    corpus.flow_command("reindex", "Make a corpus match a folder or list exactly: add new images, remove missing ones.")
)
app.command()(features.features)
app.command()(finetune.finetune)
app.command()(evaluate.evaluate)
app.command()(evaluate.pipeline)
app.command()(search.search)
app.command()(generate.generate)
app.command()(compare.compare)
app.command()(registry.promote)
app.command()(registry.rollback)
app.command()(registry.pull)
app.add_typer(registry.models_app, name="models")
app.add_typer(tiny.app, name="tiny")
app.add_typer(index.app, name="index")
app.add_typer(sample.app, name="sample")
app.command()(submit.submit)
app.command()(deploy.deploy)
app.command()(services.up)
app.command()(services.down)
app.command()(purge.purge)
app.command()(settings.settings)
app.command()(doctor.doctor)


def main() -> None:
    """Run the command line; a `UserError` is printed as one line, with exit status 2."""
    # Imports create millions of objects, all of which stay: with the default thresholds, garbage collection takes a
    # sixth of a command's startup.
    gc.set_threshold(100_000, 50, 100)
    settings.load_environment()
    try:
        app()
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
