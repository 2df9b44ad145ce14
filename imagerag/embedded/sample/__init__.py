"""The sample corpus: real drawings with names, small enough to ship in the package.

Concepts are emoji, drawn in several styles at 128x128 pixels on white. Every concept belongs permanently to one split;
all claims about generalisation rest on this. `data/ATTRIBUTION.md` names authors and licences;
`imagerag.recipes.sample` rebuilds the data.
"""

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

DATA = Path(__file__).parent / "data"
SIDE = 128
"""Width and height of the drawings in pixels."""
SPLITS = ("base", "adapter", "held_out")
"""`base` trains the base model and the encoder, `adapter` only the adapter, `held_out` nothing at all."""


@dataclass(frozen=True)
class Style:
    """One set of drawings by one author."""

    name: str
    title: str
    licence: str
    """SPDX identifier."""
    url: str
    author: str


STYLES = (
    Style("noto", "Noto Emoji", "Apache-2.0", "https://github.com/googlefonts/noto-emoji", "Google"),
    Style("twemoji", "Twemoji", "CC-BY-4.0", "https://github.com/jdecked/twemoji", "Twitter and contributors"),
    Style("fluent-3d", "Fluent Emoji 3D", "MIT", "https://github.com/microsoft/fluentui-emoji", "Microsoft"),
    Style("noto-v1", "Noto Emoji 1", "Apache-2.0", "https://github.com/googlefonts/noto-emoji", "Google"),
    Style("fxemoji", "Firefox OS Emoji", "Apache-2.0", "https://github.com/mozilla/fxemoji", "Mozilla"),
    Style("emojione", "EmojiOne 2", "CC-BY-4.0", "https://github.com/EmojiTwo/emojitwo", "Ranks.com and contributors"),
)


@dataclass(frozen=True)
class Concept:
    """What a drawing shows, in any style."""

    codepoint: str
    """Lower-case hexadecimal code points joined by `-`, without U+FE0F: `1f349`."""
    name: str
    keywords: tuple[str, ...]
    group: str
    family: str
    """Shared by the variants of a concept; a family belongs to one split."""
    split: str


@dataclass(frozen=True)
class Drawing:
    """One concept in one style."""

    concept: Concept
    style: Style
    image: bytes
    """WebP, 128x128 pixels, RGB."""

    def pixels(self, side: int = SIDE) -> "np.ndarray":
        """Return the image as bytes (3, `side`, `side`)."""
        import numpy as np
        from PIL import Image

        image = Image.open(io.BytesIO(self.image)).convert("RGB")
        if side != SIDE:
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


@cache
def load_concepts() -> tuple[Concept, ...]:
    """Return all concepts, in Unicode's order."""
    text = (DATA / "concepts.csv").read_text(encoding="utf-8")
    return tuple(
        Concept(
            codepoint=row["codepoint"],
            name=row["name"],
            keywords=tuple(row["keywords"].split("|")),
            group=row["group"],
            family=row["family"],
            split=row["split"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def load_drawings(styles: Collection[str] | None = None, splits: Collection[str] | None = None) -> list[Drawing]:
    """Return the drawings of the named styles and splits (by default all), style by style in Unicode's order."""
    import pyarrow.parquet as pq

    concepts = {concept.codepoint: concept for concept in load_concepts()}
    drawings = []
    for style in STYLES:
        if styles is not None and style.name not in styles:
            continue
        table = pq.read_table(DATA / f"{style.name}.parquet")
        for codepoint, image in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if splits is None or concepts[codepoint].split in splits:
                drawings.append(Drawing(concepts[codepoint], style, image))
    return drawings
