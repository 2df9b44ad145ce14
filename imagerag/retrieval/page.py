"""Search results as a self-contained HTML page: no scripts, no network requests, embedded images."""

import io
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from jinja2 import ChoiceLoader, Environment, PackageLoader
from PIL import Image

from imagerag.retrieval.search import Neighbour
from imagerag.storage.files import write_file

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


@dataclass(frozen=True)
class Section:
    """A query and its results."""

    title: str
    neighbours: Sequence[Neighbour]
    """Found rows, with their images."""


def write_page(path: Path, *, title: str, sections: Sequence[Section]) -> None:
    """Write the page; an existing file is replaced atomically."""
    filters: dict[str, Callable[..., object]] = {"data_uri": data_uri, "web_link": web_link}
    html = render("imagerag.retrieval", "page.html", filters, title=title, sections=sections)
    write_file(str(path), html.encode())


def render(package: str, template: str, filters: Mapping[str, Callable[..., object]], **values: object) -> str:
    """Return the HTML of a package's template with `values`, which are escaped."""
    loaders = [PackageLoader(each, "") for each in (package, "imagerag.retrieval")]  # the latter has base.html
    environment = Environment(loader=ChoiceLoader(loaders), autoescape=True)
    environment.filters.update(filters)
    return environment.get_template(template).render(values)


def data_uri(image: bytes) -> str:
    """Return an encoded image as a `data:` URI."""
    with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
        mime_type = opened.get_format_mimetype()
    return f"data:{mime_type};base64,{b64encode(image).decode()}"


def web_link(url: str) -> str | None:
    """Return the URL if it is safe to link to (http or https, not `javascript:`, for example), else None."""
    return url if urlsplit(url).scheme in ("http", "https") else None
