"""Images that people have already, in whichever form, and what has to come of each: one source a case."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from tests.corpus.fetched import MAX_BYTES
from tests.corpus.photos import encoded, scene


@dataclass(frozen=True, kw_only=True)
class Given:
    """A source, and what has to come of its rows."""

    what: str
    make: Callable[[Path], str]
    """Writes it into an empty folder, and returns what a user calls it."""
    outcomes: Mapping[str, str] = field(default_factory=dict)
    """Of the good rows, by caption: `success`, or the reason of the failure."""
    urls: Mapping[str, str] = field(default_factory=dict)
    """What the URLs of rows end with, by caption."""
    size: tuple[int, int] | None = None
    """Of all stored pictures."""
    invalid: tuple[str, ...] = ()
    """What is said of each bad row."""
    num_duplicates: int = 0
    error: str = ""
    """What is said if the source itself is refused."""


@cache
def photo(seed: int = 0) -> bytes:
    return encoded(scene((60, 90), seed))


def of_every_kind() -> dict[str, bytes]:
    """What a table may have in its cells, by the outcome: the limits are those of what is fetched."""
    return {
        "unsupported_format": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "corrupt_image": encoded(scene())[:3000],
        "too_many_pixels": encoded(Image.new("RGB", (401, 641))),
        "too_many_bytes": photo() + bytes(MAX_BYTES),
        "success": photo(),
    }
