"""`imagerag models`, `promote`, `rollback` and `pull`: a registered model, without MLflow's UI."""

import getpass
import os
from pathlib import Path
from typing import Annotated

import typer

from imagerag.cli.names import ModelNameOption
from imagerag.errors import UserError

ReasonOption = Annotated[str, typer.Option(help="Reason, stored with the version.")]


models_app = typer.Typer(help="List the versions of the registered model, or remove one.")


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, model_name: ModelNameOption = None) -> None:
    """List the versions of the registered model: aliases, base model, index, training, author and reason."""
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from imagerag.cli.terminal import PlainConsole
    from imagerag.registry.versions import list_versions
    from imagerag.settings import settings_of

    settings = settings_of(model_name)
    table = Table(title=settings.model_name, title_justify="left")
    for column in ("version", "aliases", "registered", "base model", "index", "training"):
        table.add_column(column)
    promoted = []
    for info in list_versions(settings):
        index = f"{info.pinned('index_name')} {info.pinned('index_version')}{', portable' if info.portable else ''}"
        if reason := info.pinned("reason"):  # the gate's reasons are too long for a column
            promoted.append(f"version {info.version}, promoted by {info.pinned('promoted_by')}: {reason}")
        table.add_row(
            str(info.version),
            ", ".join(info.aliases),
            f"{info.created_at:%Y-%m-%d %H:%M}",
            info.pinned("base"),
            index if info.signed else "not registered by imagerag",
            info.pinned("training"),
        )
    console = PlainConsole()
    console.print(table)
    for line in promoted:
        console.print(line, highlight=False, markup=False)


@models_app.command()
def remove(
    version: Annotated[int, typer.Argument(help="Number of the version; `imagerag models` lists them.")],
    model_name: ModelNameOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Remove a version without an alias: its files, and its pin on its index."""
    from imagerag.registry.removal import remove as remove_version
    from imagerag.settings import settings_of

    settings = settings_of(model_name)
    if not yes:
        typer.confirm(f"Permanently remove version {version} of {settings.model_name}?", abort=True)
    removed = remove_version(settings, version)
    typer.echo(
        f"removed version {version}, {removed.num_bytes / 2**20:,.1f} MiB; version {removed.index} is deleted with the "
        "next publication, unless something else pins it"
    )


def promote(
    version: Annotated[int, typer.Argument(help="Number of the version; `imagerag models` lists them.")],
    reason: ReasonOption,
    model_name: ModelNameOption = None,
) -> None:
    """Make a version of the registered model the champion."""
    from imagerag.registry.promotion import promote as promote_version
    from imagerag.settings import settings_of

    promote_version(settings_of(model_name), version, reason=reason, author=_user())
    typer.echo(f"version {version} is the champion")


def rollback(reason: ReasonOption, model_name: ModelNameOption = None) -> None:
    """Make the previous champion the champion again."""
    from imagerag.registry.promotion import rollback as roll_back
    from imagerag.settings import settings_of

    version = roll_back(settings_of(model_name), reason=reason, author=_user())
    typer.echo(f"version {version} is the champion again")


def pull(
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    alias: Annotated[str | None, typer.Option(help="Alias of the version. Default: `champion`.")] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Number of the version, instead of an alias.")] = None,
    model_name: ModelNameOption = None,
    mlflow: Annotated[
        bool, typer.Option("--mlflow", help="Write the MLflow model, after checking the files that MLflow executes.")
    ] = False,
) -> None:
    """Write a registered model as a diffusers folder, for `ImageRAGTurboPipeline.from_pretrained`."""
    if alias is not None and version is not None:
        raise UserError("give either --alias or --version, not both")
    from imagerag.cli.quiet import quiet_models
    from imagerag.registry.fetch import pull as pull_version
    from imagerag.registry.fetch import pull_served
    from imagerag.settings import settings_of

    quiet_models()
    info = (pull_served if mlflow else pull_version)(settings_of(model_name), alias or str(version or "champion"), out)
    index = "with its index" if info.portable else f"for the index {info.pinned('index_name')!r}"
    typer.echo(f"version {info.version} is in {out}, {index} at version {info.pinned('index_version')}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        return f"user {os.getuid()}"
