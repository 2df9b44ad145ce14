"""Which rows of searches are shown."""

import pytest

from imagerag.retrieval.ranking import diversify, merge, split_phrases
from imagerag.retrieval.search import Neighbour


def row(id: str, caption: str = "", similarity: float = 0.5) -> Neighbour:
    return Neighbour(
        id=id, caption=caption or id, url="", source="", licence="", width=1, height=1, score=0.0, similarity=similarity
    )


def ids(rows: list[Neighbour]) -> list[str]:
    return [each.id for each in rows]


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a slice of watermelon", []),
        ("", []),
        ("a cat and a dog", ["cat", "dog"]),
        ("A red fox with an umbrella, next to the castle", ["red fox", "umbrella", "castle"]),
        ("two cats on a mat", ["cats", "mat"]),
        ("cat and cat", []),
        ("a cat, ", []),
        ("sandwich", []),
        ("ein Hund und eine Katze", []),
    ],
)
def test_phrases(prompt: str, phrases: list[str]) -> None:
    assert split_phrases(prompt) == phrases


def test_no_caption_takes_all_places() -> None:
    ranking = [row("a1", "a"), row("a2", "a"), row("a3", "a"), row("b1", "b"), row("a4", "a"), row("c1", "c")]
    assert ids(diversify(ranking, 4, 2)) == ["a1", "a2", "b1", "c1"]
    assert ids(diversify(ranking, 3, 2)) == ["a1", "a2", "b1"]
    assert ids(diversify(ranking, 1, 2)) == ["a1"]


def test_where_there_is_nothing_else_a_caption_may_take_more() -> None:
    ranking = [row("a1", "a"), row("a2", "a"), row("a3", "a"), row("b1", "b")]
    assert ids(diversify(ranking, 4, 2)) == ["a1", "a2", "a3", "b1"]
    assert ids(diversify(ranking[:3], 4, 2)) == ["a1", "a2", "a3"]


def test_merging_takes_from_every_search() -> None:
    whole, cat, dog = [row("x"), row("cat1")], [row("cat1"), row("cat2")], [row("dog1"), row("dog2")]
    assert ids(merge([whole, cat, dog], 3)) == ["cat1", "x", "dog1"]


def test_merging_keeps_the_highest_similarity() -> None:
    (merged,) = merge([[row("a", similarity=0.2)], [row("a", similarity=0.9)], [row("a", similarity=0.4)]], 4)
    assert merged.similarity == 0.9
    assert merged.score == pytest.approx(3 / 61)
