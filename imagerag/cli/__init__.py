"""The command line `imagerag`: everything that can be done without the Prefect UI.

This package is the composition root: the only part of `imagerag` that may import `flows`. Each command imports what it
needs when it runs, so that `imagerag --help` is fast.
"""

import errno
import gc
import io
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
    status,
    submit,
    tiny,
)
from imagerag.cli.options import FlowCommand
from imagerag.errors import UserError
from imagerag.plain import printable

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Reasons why a file can't be written that only the user can remove."""

_OF_THE_PIPELINE = ("img2dataset", "prefect", "ray", "torch_fidelity")
"""Packages that who only uses a model can do without."""

app = typer.Typer(
    name="imagerag",
    help="Index your images, and generate new ones with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command(cls=FlowCommand)(corpus.ingest)
app.command(cls=FlowCommand)(corpus.reindex)
app.command(cls=FlowCommand)(features.features)
app.command(cls=FlowCommand)(finetune.finetune)
app.command(cls=FlowCommand)(evaluate.evaluate)
app.command(cls=FlowCommand)(evaluate.pipeline)
app.command()(status.status)
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
    """Run the command line; a `UserError` or a file that can't be written ends it with one line and exit status 2."""
    # Imports create millions of objects, all of which stay: with the default thresholds, garbage collection takes a
    # sixth of a command's startup.
    gc.set_threshold(100_000, 50, 100)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal can't encode
    settings.load_environment()
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OF_THE_PIPELINE:
            raise
        _fail(f"this command needs {package}, which is not installed: pip install 'imagerag-turbo[pipeline]'")
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        _fail(f"{error.filename or 'a file'}: {error.strerror}")


def _fail(message: str) -> None:
    print(printable(f"error: {message}"), file=sys.stderr)
    sys.exit(2)
