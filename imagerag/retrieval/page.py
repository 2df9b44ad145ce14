"""Search results as one HTML page that needs nothing else: no scripts, no network, images inside."""

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader
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
    environment = Environment(loader=PackageLoader("imagerag.retrieval", ""), autoescape=True)
    environment.filters.update(data_uri=_data_uri, web_link=_web_link)
    html = environment.get_template("page.html").render(title=title, sections=sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(html, encoding="utf-8")
    unfinished.replace(path)


def _data_uri(image: bytes) -> str:
    with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
        mime_type = opened.get_format_mimetype()
    return f"data:{mime_type};base64,{b64encode(image).decode()}"


def _web_link(url: str) -> str | None:
    """Return the URL if a page may link to it: a caption's neighbour may come from anywhere, `javascript:` included."""
    return url if urlsplit(url).scheme in ("http", "https") else None
