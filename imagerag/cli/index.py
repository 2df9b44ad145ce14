"""`imagerag index`: what is published, and what to do about it."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from imagerag.artifacts import Publication
    from imagerag.retrieval.store import Store
    from imagerag.retrieval.takedown import Removal

app = typer.Typer(help="Show, publish, roll back and take down.", no_args_is_help=True)

NameOption = Annotated[str, typer.Option(help="The corpus.")]


@app.command()
def status(name: NameOption = "images") -> None:
    """Show the published version, the newest one, and the history."""
    from rich.console import Console
    from rich.table import Table

    from imagerag.retrieval.pins import pins
    from imagerag.retrieval.publish import status as read_status

    state = read_status(_store(name))
    typer.echo(f"encoder    {state.encoder.id}, {state.encoder.dim} dimensions, digest {state.encoder.digest}")
    if state.published_version is None:
        typer.echo("published  nothing yet")
    else:
        typer.echo(f"published  version {state.published_version}, {state.num_rows:,} rows, index {state.kind}")
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
    Console().print(table)
    for label, version in sorted(pins(_store(name)).items(), key=lambda each: each[1]):
        typer.echo(f"version {version} is kept for {label}")


@app.command()
def publish(name: NameOption = "images") -> None:
    """Index and check the newest version, and publish it if it passes."""
    from imagerag.retrieval.index import IndexConfig, build_index
    from imagerag.retrieval.publish import PublishConfig
    from imagerag.retrieval.publish import publish as publish_version

    store = _store(name)
    _show(publish_version(store, build_index(store, IndexConfig()), PublishConfig()))


@app.command()
def rollback(
    name: NameOption = "images",
    to: Annotated[int | None, typer.Option(help="A kept version; the one before if not given.")] = None,
) -> None:
    """Let readers see an earlier publication."""
    from imagerag.retrieval.publish import rollback as roll_back

    _show(roll_back(_store(name), to))


@app.command()
def remove(
    name: NameOption = "images",
    url: Annotated[list[str] | None, typer.Option(help="Of an image to take down; can be repeated.")] = None,
    id: Annotated[list[str] | None, typer.Option(help="Of a row to take down; can be repeated.")] = None,
    sha256: Annotated[list[str] | None, typer.Option(help="Of an image file to take down; can be repeated.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take images down: out of the shards, the table and all its versions, for good, whatever URL they came from."""
    from imagerag.corpus.takedown import hashes_of, take_down
    from imagerag.retrieval import takedown
    from imagerag.settings import Settings

    store, shards_uri = _store(name), Settings().shards_of(name)
    hashes = [*(sha256 or ()), *(hashes_of(shards_uri, url) if url else ())]
    rows = takedown.find(store, ids=id or (), image_sha256s=hashes)
    hashes = sorted({*hashes, *rows["image_sha256"].to_pylist()})
    typer.echo(f"{rows.num_rows} rows of {name}, {len(hashes)} images")
    if not yes:
        typer.confirm("Remove them for good? No rollback past this is possible", abort=True)
    # The shards first: an ingest between the two must not bring the rows back.
    take_down(shards_uri, urls=url or (), sha256s=hashes)
    removal = takedown.remove(store, image_sha256s=hashes)
    typer.echo(f"removed {removal.num_rows} rows; the table is at version {removal.version}")
    _name_models(name, removal)


def _name_models(name: str, removal: "Removal") -> None:
    """Tell which registered models need their makers' attention after a takedown."""
    from imagerag.registry.versions import MODEL_NAME, versions_of_index
    from imagerag.settings import Settings

    for label in removal.unpinned:
        why = "used removed rows" if label in removal.pinned_by else "used an earlier version"
        typer.echo(
            f"{label} {why}, and can't load any more unless it is portable: register it again on version "
            f"{removal.version}"
        )
    clean = [label for label in removal.unpinned if label not in removal.pinned_by]
    for info in versions_of_index(Settings(), name):
        if info.portable and not any(label.startswith(f"{MODEL_NAME}-{info.version}-") for label in clean):
            typer.echo(
                f"version {info.version} of {MODEL_NAME} is portable and holds a copy of version "
                f"{info.pinned('index_version')} of the index, removed rows included if it had them: delete it"
            )


def _store(name: str) -> "Store":
    from imagerag.retrieval.store import Store
    from imagerag.settings import Settings, check_name

    return Store(Settings().index_uri, check_name(name))


def _show(publication: "Publication") -> None:
    for check in publication.checks:
        typer.echo(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.detail}")
    if not publication.published:
        typer.echo("Not published: readers stay on what they see.")
        raise typer.Exit(1)
    typer.echo(f"readers see version {publication.version}, {publication.num_rows:,} rows")
