"""The sample corpus as it ships."""

import hashlib
import io
from collections import Counter, defaultdict
from importlib.resources import files

import pytest
from PIL import Image

from imagerag.embedded.sample import SPLITS, STYLES, Drawing, load_concepts, load_drawings
from imagerag.recipes.sample import family_of, split_of

ASSIGNMENT_SHA256 = "a1201d4d915603750097c67f76a83797bd9e0c032170ccc14ef06c4ef72a7610"
"""Models were trained on this split: who changes it must train them again."""


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return load_drawings()


def test_the_split_is_the_one_that_models_were_trained_on() -> None:
    lines = (f"{c.codepoint} {c.split}" for c in sorted(load_concepts(), key=lambda c: c.codepoint))
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == ASSIGNMENT_SHA256


def test_the_splits_have_their_shares() -> None:
    counts = Counter(concept.split for concept in load_concepts())
    for split, share in zip(SPLITS, (0.6, 0.3, 0.1), strict=True):
        assert counts[split] / counts.total() == pytest.approx(share, abs=0.02)


def test_every_concept_has_a_code_point_and_a_name_of_its_own() -> None:
    concepts = load_concepts()
    assert len(concepts) == len({c.codepoint for c in concepts}) == len({c.name.lower() for c in concepts}) == 1632
    assert all(c.name.strip() and all(keyword.strip() for keyword in c.keywords) for c in concepts)
    assert not {c.group for c in concepts} & {"flags", "component"}


def test_a_family_lies_in_one_split_by_the_rule_of_the_build() -> None:
    for concept in load_concepts():
        assert (concept.family, concept.split) == (family_of(concept.name), split_of(concept.family))


@pytest.mark.parametrize(
    "variants",
    [
        ("man farmer", "woman farmer", "farmer"),
        ("person running", "man running", "woman running: facing right"),
        ("one o'clock", "twelve-thirty"),
        ("keycap: 1", "keycap: 10"),
        ("full moon", "waning crescent moon", "new moon face"),
        ("red heart", "light blue heart", "heart suit"),
        ("cat face", "grinning cat", "cat with wry smile"),
    ],
)
def test_variants_of_a_concept_are_one_family(variants: tuple[str, ...]) -> None:
    assert len({family_of(name) for name in variants}) == 1


def test_different_concepts_are_different_families() -> None:
    assert len({family_of(name) for name in ("man farmer", "man cook", "watermelon", "full moon", "moon cake")}) == 5


def test_every_style_draws_most_concepts(drawings: list[Drawing]) -> None:
    counts = Counter(drawing.style.name for drawing in drawings)
    assert counts.keys() == {style.name for style in STYLES}
    # A picture that a style uses twice stands for one concept only.
    assert min(counts["noto"], counts["twemoji"]) > 0.98 * len(load_concepts())
    assert min(counts.values()) > 800


def test_a_style_draws_no_two_concepts_alike(drawings: list[Drawing]) -> None:
    assert max(Counter((drawing.style.name, drawing.image) for drawing in drawings).values()) == 1


def test_every_drawing_is_a_small_picture_on_white(drawings: list[Drawing]) -> None:
    for drawing in drawings:
        with Image.open(io.BytesIO(drawing.image)) as image:
            assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (128, 128))
            corners = [image.getpixel((x, y)) for x in (0, 127) for y in (0, 127)]
            assert all(min(corner) > 200 for corner in corners), drawing.concept  # WebP loses a little
            assert image.getextrema() != ((255, 255),) * 3, drawing.concept


def test_no_picture_is_in_two_splits(drawings: list[Drawing]) -> None:
    splits = defaultdict(set)
    for drawing in drawings:
        splits[drawing.image].add(drawing.concept.split)
    assert all(len(found) == 1 for found in splits.values())


def test_drawings_are_chosen_by_style_and_split(drawings: list[Drawing]) -> None:
    chosen = load_drawings(styles=["noto"], splits=["held_out"])
    assert chosen == [d for d in drawings if d.style.name == "noto" and d.concept.split == "held_out"]
    assert chosen


def test_the_data_is_small_and_credits_its_authors() -> None:
    sizes = {
        entry.name: len(entry.read_bytes()) for entry in files("imagerag.embedded.sample").joinpath("data").iterdir()
    }
    assert max(sizes.values()) < 4e6
    assert sum(sizes.values()) < 15e6
    attribution = files("imagerag.embedded.sample").joinpath("data/ATTRIBUTION.md").read_text()
    for style in STYLES:
        assert f"`{style.name}.parquet`" in attribution
        assert style.url in attribution
        assert style.licence in attribution
