"""Search results as one HTML page that needs nothing else: no scripts, no network, images inside."""

import io
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from jinja2 import ChoiceLoader, Environment, PackageLoader
from PIL import Image

from imagerag.retrieval.search import Neighbour

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


@dataclass(frozen=True)
class Section:
    """One query and what it found."""

    title: str
    neighbours: Sequence[Neighbour]
    """With their images."""


def write_page(path: Path, *, title: str, sections: Sequence[Section]) -> None:
    """Write the page, replacing the file at once if there is one."""
    filters: dict[str, Callable[..., object]] = {"data_uri": data_uri, "web_link": web_link}
    write_whole(path, render("imagerag.retrieval", "page.html", filters, title=title, sections=sections))


def render(package: str, template: str, filters: Mapping[str, Callable[..., object]], **values: object) -> str:
    """Return the page that a package's template makes of `values`, which stay text whatever they hold."""
    loaders = [PackageLoader(each, "") for each in (package, "imagerag.retrieval")]  # the latter has base.html
    environment = Environment(loader=ChoiceLoader(loaders), autoescape=True)
    environment.filters.update(filters)
    return environment.get_template(template).render(values)


def write_whole(path: Path, text: str) -> None:
    """Write a file, replacing one that is there at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def data_uri(image: bytes) -> str:
    """Return an encoded image as a URI that holds it."""
    with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
        mime_type = opened.get_format_mimetype()
    return f"data:{mime_type};base64,{b64encode(image).decode()}"


def web_link(url: str) -> str | None:
    """Return the URL if a page may link to it: a caption's neighbour may come from anywhere, `javascript:` included."""
    return url if urlsplit(url).scheme in ("http", "https") else None
