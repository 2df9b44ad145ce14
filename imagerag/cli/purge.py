"""`imagerag purge`: permanently delete a home."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from imagerag.errors import UserError

OWN = (
    "compare",
    "digests.json",
    "index",
    "logs",
    "mlflow",
    "models",
    "password",
    "prefect",
    "sample",
    "services",
    "shards",
    "training",
)
"""Files and folders that this package creates in a home; everything else is left alone."""


def purge(
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete the home with all its data: images, indexes, training sets, models and the history of all runs."""
    from imagerag import services
    from imagerag.settings import Settings

    settings = Settings()
    home = settings.home
    found = [home / name for name in OWN if (home / name).exists()]
    if not found:
        typer.echo(f"There is nothing to delete in {home}.")
        return
    typer.echo(f"This permanently deletes from {home}:")
    for path in found:
        typer.echo(f"  {path.name:<14}{_size(path) / 1e6:>10,.1f} MB")
    for uri in (settings.shards_uri, settings.index_uri, settings.training_uri):
        if not Path(uri).is_relative_to(home):
            typer.echo(f"  {uri} is outside of the home and is kept")
    if not yes and not typer.confirm("Delete all of it?"):
        raise UserError("nothing was deleted")
    for service in services.down(home):
        typer.echo(f"Stopped {service.name}.")
    for path in [path for path in home.iterdir() if path.name in OWN]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    left = sorted(path.name for path in home.iterdir())
    if left:
        typer.echo(f"Deleted. {home} is kept, because it contains other files: {', '.join(left)}")
    else:
        home.rmdir()
        typer.echo(f"Deleted {home}.")


def _size(path: Path) -> int:
    """Return the size of a file or folder in bytes."""
    files = [path] if not path.is_dir() else path.rglob("*")
    return sum(each.lstat().st_size for each in files if not each.is_dir())
