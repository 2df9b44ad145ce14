import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import UnidentifiedImageError

from imagerag.retrieval.page import Section, write_page
from imagerag.retrieval.search import Neighbour
from tests.retrieval.rows import png

HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(1)>"


def neighbour(**values: object) -> Neighbour:
    row = {
        "id": "1",
        "caption": "a dog",
        "url": "https://example.org/1.png?a=1&b=2",
        "source": "noto",
        "licence": "CC0-1.0",
        "width": 4,
        "height": 4,
        "score": 0.87654,
        "image": png((1, 2, 3)),
    }
    return Neighbour(**(row | values))  # type: ignore[arg-type]


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write(tmp_path: Path, *sections: Section, title: str = "found") -> Page:
    path = tmp_path / "new" / "page.html"
    write_page(path, title=title, sections=sections)
    assert list(path.parent.iterdir()) == [path]
    return Page(path)


def test_page_shows_all_of_a_neighbour(tmp_path: Path) -> None:
    page = write(
        tmp_path, Section("dogs", [neighbour()]), Section("cats", [neighbour(caption="a cat")]), Section("no", [])
    )
    first, second = page.all("img")
    assert first["src"] == f"data:image/png;base64,{b64encode(png((1, 2, 3))).decode()}"
    assert (first["alt"], second["alt"]) == ("a dog", "a cat")
    for text in ("dogs", "cats", "0.877", "noto", "CC0-1.0", "https://example.org/1.png?a=1&b=2", "Nothing was found."):
        assert text in page.text
    assert page.all("a")[0] == {"href": "https://example.org/1.png?a=1&b=2", "rel": "noopener noreferrer nofollow"}


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    page = write(tmp_path, Section("dogs", [neighbour()]))
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not page.all("script") + page.all("link")
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    hostile = neighbour(caption=HOSTILE, source=HOSTILE, licence=HOSTILE, url=HOSTILE)
    page = write(tmp_path, Section(HOSTILE, [hostile]), title=HOSTILE)
    assert not page.all("script")
    (image,) = page.all("img")
    assert image["alt"] == HOSTILE
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) == 7


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        " javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "data:text/html,x",
        "file:///etc/passwd",
        "//x/y",
    ],
)
def test_only_web_addresses_become_links(tmp_path: Path, url: str) -> None:
    page = write(tmp_path, Section("dogs", [neighbour(url=url)]))
    assert page.all("a") == []
    assert url in page.text


def test_the_type_of_an_image_is_read_from_its_bytes(tmp_path: Path) -> None:
    with pytest.raises(UnidentifiedImageError):
        write(tmp_path, Section("dogs", [neighbour(image=b"<svg onload='alert(1)'/>")]))
    assert not (tmp_path / "new").exists()


def test_an_earlier_page_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, Section("dogs", [neighbour()]))
    page = write(tmp_path, Section("cats", [neighbour(caption="a cat")]))
    assert not re.search("dog", page.text)
