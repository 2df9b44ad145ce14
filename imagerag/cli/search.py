"""`imagerag search`: nearest neighbours of a text or an image in the published index."""

from enum import StrEnum
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

import typer

from imagerag.cli.names import NameOption, corpus_name
from imagerag.errors import UserError

if TYPE_CHECKING:
    from imagerag.embedding.encoder import Encoder
    from imagerag.retrieval.search import Filters, Neighbour, Retriever
    from imagerag.settings import Settings

_SHOWN_CHARACTERS = 120
"""Maximum length of a printed caption."""


class Mode(StrEnum):
    """How a text query is matched."""

    CAPTION = "caption"
    IMAGE = "image"
    WORDS = "words"
    HYBRID = "hybrid"


def search(
    text: Annotated[str | None, typer.Argument(help="Text to search for.")] = None,
    image: Annotated[Path | None, typer.Option(help="Search for images similar to this file.")] = None,
    name: NameOption = None,
    k: Annotated[int, typer.Option(min=1, max=1000, help="Number of results.")] = 8,
    mode: Annotated[
        Mode,
        typer.Option(help="Match a text by the embeddings of captions, of images, by words, or by captions and words."),
    ] = Mode.CAPTION,
    source: Annotated[str | None, typer.Option(help="Only rows with this source.")] = None,
    licence: Annotated[str | None, typer.Option(help="Only rows with this licence.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page with the images.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Print captions in full.")] = False,
) -> None:
    """Search the published index by a text or an image."""
    from imagerag.retrieval.page import Section, write_page
    from imagerag.retrieval.search import Filters
    from imagerag.settings import Settings

    if (text is None) == (image is None):
        raise UserError("give either a text or --image FILE to search for")
    name = corpus_name(name)
    retriever, encoder = open_index(Settings(), name)
    filters = Filters(source=source, licence=licence)
    if text is not None:
        neighbours = search_text(retriever, encoder, text, k, mode, filters)
    else:
        assert image is not None
        neighbours = search_image(retriever, encoder, image, k, filters)
    title = text or str(image)
    print_neighbours(title, neighbours, full=full)
    if html is not None:
        write_page(html, title=f"imagerag search: {name}", sections=[Section(title, neighbours)])
        typer.echo(f"page: {html}")


def open_index(settings: "Settings", name: str) -> "tuple[Retriever, Encoder]":
    """Open the published index of a corpus and load its encoder."""
    from imagerag.embedding.encoder import load_encoder
    from imagerag.retrieval.search import Retriever

    retriever = Retriever(settings.index_uri, name)
    encoder = load_encoder(retriever.encoder.id)
    retriever.check_encoder(encoder.identity)
    return retriever, encoder


def search_text(
    retriever: "Retriever", encoder: "Encoder", text: str, k: int, mode: Mode, filters: "Filters"
) -> "list[Neighbour]":
    """Return the `k` nearest rows of a text, with their images."""
    if not text.strip():
        raise UserError("the text to search for is empty")
    embeds = encoder.encode_texts([text])
    return retriever.search(embeds, k, by=mode.value, texts=[text], filters=filters, images=True)[0]


def search_image(
    retriever: "Retriever", encoder: "Encoder", image: Path, k: int, filters: "Filters"
) -> "list[Neighbour]":
    """Return the `k` rows whose images are most similar to a file, with their images."""
    from imagerag.embedding.encoder import UndecodableImageError

    try:
        embeds = encoder.encode_images([image.read_bytes()])
    except (OSError, UndecodableImageError) as error:
        raise UserError(f"--image has to be a readable image file; {image}: {error}") from error
    return retriever.search(embeds, k, by="image", filters=filters, images=True)[0]


def print_neighbours(title: str, neighbours: "list[Neighbour]", *, full: bool = True) -> None:
    """Print neighbours as a table, the nearest first; long captions are shortened unless `full`."""
    from rich.table import Table

    from imagerag.cli.terminal import PlainConsole

    table = Table(title=title, title_justify="left")
    for column in ("score", "caption", "source", "url"):
        table.add_column(column, overflow="fold")
    for neighbour in neighbours:
        caption = neighbour.caption if full else shorten(neighbour.caption, _SHOWN_CHARACTERS, placeholder=" …")
        table.add_row(f"{neighbour.score:.3f}", caption, neighbour.source, neighbour.url)
    PlainConsole().print(table)
