from typing import Any

import numpy as np
import pytest

from imagerag.errors import UserError
from imagerag.retrieval.schema import EncoderIdentity
from imagerag.retrieval.search import By, Filters, Retriever
from imagerag.retrieval.store import Store
from tests.retrieval.rows import DIM, append, embeddings, index_and_publish, make_rows

CAPTIONS = [
    "a slice of watermelon",
    'a "quoted" dog\'s tail',
    "AND OR NOT (watermelon)",
    "life of a cat",
    "an ocean wave",
    "slice of bread",
]
SOURCES = ["noto", "o'hara", "noto", "' OR '1'='1", "noto", "fluent"]


@pytest.fixture
def retriever(store: Store) -> Retriever:
    append(store, make_rows(0, 6, caption=CAPTIONS, source=SOURCES))
    index_and_publish(store)
    return Retriever(store.uri, store.name)


def found(retriever: Retriever, k: int = 10, **arguments: Any) -> list[str]:
    (neighbours,) = retriever.search(embeddings(0, 1, DIM), k, **arguments)
    return [neighbour.caption for neighbour in neighbours]


def test_nothing_published(store: Store) -> None:
    with pytest.raises(UserError, match=r"nothing was published .* `imagerag index publish` or `imagerag ingest`"):
        Retriever(store.uri, store.name)


def test_no_table(store: Store) -> None:
    with pytest.raises(UserError, match="no table 'absent'"):
        Retriever(store.uri, "absent")


def test_another_encoder_is_refused(retriever: Retriever, store: Store) -> None:
    other = EncoderIdentity(id="encoder-b", digest="b" * 64, dim=DIM)
    with pytest.raises(UserError, match=f"{'a' * 64}.*{'b' * 64}"):
        Retriever(store.uri, store.name, other)
    assert Retriever(store.uri, store.name, retriever.encoder).version == retriever.version


@pytest.mark.parametrize(("by", "salt"), [("caption", 0), ("image", 1)])
def test_vector_search_equals_numpy(retriever: Retriever, by: By, salt: int) -> None:
    queries, rows = embeddings(6, 9, DIM), embeddings(0, 6, DIM, salt=salt)
    results = retriever.search(queries, 4, by=by)
    similarities = queries @ rows.T
    for neighbours, expected in zip(results, similarities, strict=True):
        order = np.argsort(-expected)[:4]
        assert [neighbour.caption for neighbour in neighbours] == [CAPTIONS[i] for i in order]
        assert [neighbour.score for neighbour in neighbours] == pytest.approx(expected[order], abs=1e-5)


def test_a_neighbour_is_the_whole_row(retriever: Retriever) -> None:
    row = make_rows(0, 6, caption=CAPTIONS, source=SOURCES).to_pylist()[0]
    (neighbour,) = retriever.search(embeddings(0, 1, DIM), 1, images=True)[0]
    assert neighbour.score == pytest.approx(1)
    assert neighbour.id == row["id"].hex()
    for column in ("caption", "url", "source", "licence", "width", "height", "image"):
        assert getattr(neighbour, column) == row[column]
    assert retriever.search(embeddings(0, 1, DIM), 1)[0][0].image is None


def test_k_beyond_the_table_gives_all_rows(retriever: Retriever) -> None:
    assert len(found(retriever, 1_000)) == 6


@pytest.mark.parametrize("k", [0, -1, 1_001])
def test_k_has_bounds(retriever: Retriever, k: int) -> None:
    with pytest.raises(UserError, match=f"k must be 1 to 1000, got {k}"):
        found(retriever, k)


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (np.ones((1, DIM + 1), np.float32), rf"shape \(Q, {DIM}\).*got \(1, {DIM + 1}\)"),
        (np.ones(DIM, np.float32), rf"shape \(Q, {DIM}\).*got \({DIM},\)"),
        (np.full((1, DIM), np.nan, np.float32), "NaN"),
        (np.zeros((1, DIM), np.float32), "zero"),
        (None, "needs the queries' embeddings"),
    ],
)
def test_bad_queries_are_refused(retriever: Retriever, embeds: np.ndarray | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        retriever.search(embeds, 3)


def test_a_search_by_something_else_is_refused(retriever: Retriever) -> None:
    with pytest.raises(UserError, match="'colour'"):
        found(retriever, by="colour")


def test_words(retriever: Retriever) -> None:
    (neighbours,) = retriever.search(None, 3, by="words", texts=["slices of watermelons"])
    assert neighbours[0].caption == "a slice of watermelon"
    assert {neighbour.caption for neighbour in neighbours[1:]} == {"slice of bread", "AND OR NOT (watermelon)"}
    assert neighbours[0].score > neighbours[1].score > 0


@pytest.mark.parametrize("by", ["words", "hybrid"])
@pytest.mark.parametrize(
    "text", ['"', "'", '"quoted', "dog's", "a AND (", "NOT -watermelon +x", "*", "~^:\\", "", "the"]
)
def test_no_text_breaks_the_search_for_words(retriever: Retriever, by: By, text: str) -> None:
    captions = found(retriever, by=by, texts=[text])
    assert set(captions) <= set(CAPTIONS)
    if "quoted" in text or "dog" in text:
        assert 'a "quoted" dog\'s tail' in captions


def test_hybrid_ranks_first_what_both_find(retriever: Retriever) -> None:
    (neighbours,) = retriever.search(embeddings(5, 6, DIM), 6, by="hybrid", texts=["bread"])
    assert neighbours[0].caption == "slice of bread"
    assert neighbours[0].score == pytest.approx(2 / 61)
    assert neighbours[1].score == pytest.approx(1 / 62)
    assert len({neighbour.id for neighbour in neighbours}) == len(neighbours) == 6


def test_words_need_texts(retriever: Retriever) -> None:
    with pytest.raises(UserError, match="by words needs the queries as texts"):
        found(retriever, by="words")


@pytest.mark.parametrize("by", ["caption", "image", "words", "hybrid"])
@pytest.mark.parametrize("source", sorted(set(SOURCES)))
def test_filters_with_quotes(retriever: Retriever, by: By, source: str) -> None:
    """As many are asked for as there are: what is found first and filtered then would be too few."""
    texts = ["watermelon tail cat wave bread"]
    expected = {caption for caption, other in zip(CAPTIONS, SOURCES, strict=True) if other == source}
    assert set(found(retriever, len(expected), by=by, texts=texts, filters=Filters(source=source))) == expected


def test_filters_are_joined_by_and(retriever: Retriever) -> None:
    url = "https://example.org/2.png"
    assert found(retriever, filters=Filters(source="noto", url=url, licence="CC0-1.0")) == [CAPTIONS[2]]
    assert found(retriever, filters=Filters(source="fluent", url=url)) == []


def test_filters_take_texts_only(retriever: Retriever) -> None:
    with pytest.raises(UserError, match="the filter on source must be a text, got 3"):
        found(retriever, filters=Filters(source=3))  # type: ignore[arg-type]
