"""`imagerag index`: status, publish, rollback and takedown of an index."""

from typing import TYPE_CHECKING, Annotated

import typer

from imagerag.cli.names import NameOption, corpus_name

if TYPE_CHECKING:
    from imagerag.artifacts import Publication
    from imagerag.retrieval.store import Store

app = typer.Typer(help="Show, publish and roll back an index, and take images down.", no_args_is_help=True)


@app.command()
def status(name: NameOption = None) -> None:
    """Show the published version, the newest one, and the history."""
    from rich.table import Table

    from imagerag.cli.terminal import PlainConsole
    from imagerag.retrieval.pins import pins
    from imagerag.retrieval.publish import status as read_status

    store = _store(name)
    state = read_status(store)
    typer.echo(f"encoder    {state.encoder.id}, {state.encoder.dim} dimensions, digest {state.encoder.digest}")
    if state.published_version is None:
        typer.echo("published  nothing yet")
    else:
        typer.echo(f"published  version {state.published_version}, {state.num_rows:,} rows, index {state.kind}")
    if state.recalls:
        measured = ", ".join(f"{name} {value:.3f}" for name, value in state.recalls.items())
        since = f", measured before {state.num_new_rows:,} rows were added" if state.num_new_rows else ""
        typer.echo(f"recall     {measured}{since}")
    for cached in state.features:
        made_by = f"{cached.base}, fit {cached.fit}, digest {cached.digest}"
        typer.echo(f"features   of {cached.num_rows:,} rows for {made_by}")
    changes = "not published" if state.unpublished_changes else "published"
    typer.echo(f"newest     version {state.newest_version}, {state.num_newest_rows:,} rows, {changes}")
    table = Table(title="kept for a rollback", title_justify="left")
    for column in ("version", "published at", "rows", "recall@10"):
        table.add_column(column)
    for entry in state.history:
        published_at = f"{entry.published_at:%Y-%m-%d %H:%M:%S}"
        table.add_row(str(entry.version), published_at, f"{entry.num_rows:,}", f"{entry.recall_at_10:.3f}")
    PlainConsole().print(table)
    for label, version in sorted(pins(store).items(), key=lambda each: each[1]):
        typer.echo(f"version {version} is kept for {label}")


@app.command()
def publish(name: NameOption = None) -> None:
    """Index and check the newest version as it was last done, and publish it if it passes."""
    from imagerag.retrieval.config import IndexConfig, PublishConfig
    from imagerag.retrieval.index import build_index
    from imagerag.retrieval.publish import publish as publish_version

    store = _store(name)
    with store.update_lock(typer.echo):
        published = publish_version(store, build_index(store, IndexConfig()), PublishConfig())
    _show(published)


@app.command()
def rollback(
    name: NameOption = None,
    to: Annotated[
        int | None, typer.Option(help="Version to return to. Default: the last one with complete features.")
    ] = None,
) -> None:
    """Publish an earlier version again."""
    from imagerag.retrieval.publish import rollback as roll_back

    _show(roll_back(_store(name), to))


@app.command()
def remove(
    name: NameOption = None,
    url: Annotated[list[str] | None, typer.Option(help="URL of an image; repeatable.")] = None,
    id: Annotated[list[str] | None, typer.Option(help="Id of a row; repeatable.")] = None,
    sha256: Annotated[list[str] | None, typer.Option(help="SHA-256 of an image; repeatable.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Permanently take down images, under all their URLs: from shards, table, training sets, pages and models."""
    from imagerag.settings import Settings
    from imagerag.takedown import find, take_down

    settings, name = Settings(), corpus_name(name)
    target = find(settings, name, urls=url or (), ids=id or (), sha256s=sha256 or ())
    num_images, num_rows = len(target.image_sha256s), len(target.ids)
    typer.echo(f"{num_images} images of {name}, under {len(target.urls)} URLs, in {num_rows} rows")
    if not yes:
        typer.confirm(
            "Remove them permanently, with models that contain a copy of the index? This can't be rolled back",
            abort=True,
        )
    done = take_down(settings, name, target)
    typer.echo(f"removed {done.num_samples} images from the shards")
    if done.removal is not None:
        typer.echo(f"removed {done.removal.num_rows} rows; the table is at version {done.removal.version}")
    for each in done.sweep.deleted:
        typer.echo(f"deleted {each}")
    for each in done.sweep.left:
        typer.echo(f"left: {each}")
    typer.echo(f"report: {done.uri}")


def _store(name: str | None) -> "Store":
    from imagerag.retrieval.store import Store
    from imagerag.settings import Settings

    return Store(Settings().index_uri, corpus_name(name))


def _show(publication: "Publication") -> None:
    for check in publication.checks:
        typer.echo(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.detail}")
    if not publication.published:
        typer.echo("Not published: readers stay on the current version.")
        raise typer.Exit(1)
    typer.echo(f"readers see version {publication.version}, {publication.num_rows:,} rows")
