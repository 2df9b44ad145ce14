"""Search by words in nine languages: queries with the caption that has to be found (`scripts.csv`)."""

import csv
from pathlib import Path

import pytest

from imagerag.retrieval import index
from imagerag.retrieval.ann import read_record
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from tests.retrieval.rows import DIM, append, embeddings, index_and_publish, make_rows

with (Path(__file__).parent / "scripts.csv").open(encoding="utf-8") as _file:
    ROWS = list(csv.DictReader(_file))
UNKNOWN = {"strasse"}
"""What is not found: letters that are written otherwise."""


def found_by(store: Store, **options: object) -> dict[str, list[str]]:
    """The captions that every query finds."""
    retriever = Retriever(store.uri, store.name)
    queries = [query for row in ROWS for query in row["queries"].split("|")]
    embeds = embeddings(0, len(queries), DIM) if options["by"] == "hybrid" else None
    results = retriever.search(embeds, 5, texts=queries, **options)  # type: ignore[arg-type]
    return {
        query: [neighbour.caption for neighbour in neighbours]
        for query, neighbours in zip(queries, results, strict=True)
    }


@pytest.fixture
def captions(store: Store) -> Store:
    append(store, make_rows(0, len(ROWS), caption=[row["caption"] for row in ROWS]))
    return store


def test_words_are_found_in_every_script(captions: Store) -> None:
    index_and_publish(captions)
    found = found_by(captions, by="words")
    wanted = {query: row["caption"] for row in ROWS for query in row["queries"].split("|") if query not in UNKNOWN}
    missed = {query: found[query] for query, caption in wanted.items() if caption not in found[query]}
    assert missed == {}
    strangers = sum(len(captions) - 1 for captions in found.values() if captions)
    assert strangers < 0.15 * len(wanted), "what is found has to have the word"


def test_hybrid_search_finds_them_too(captions: Store) -> None:
    index_and_publish(captions)
    found = found_by(captions, by="hybrid")
    assert "红色的龙在山上" in found["龙"]
    assert "The Who on a stage" in found["the who"]


def test_another_way_with_words_makes_the_index_anew(captions: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setattr(index, "_WORDS", {})
        before.setitem(index._VALUES, "caption", ("INVERTED", {}))
        index_and_publish(captions)
        assert found_by(captions, by="words")["龙"] == []
    index_and_publish(captions)
    assert found_by(captions, by="words")["龙"] == ["红色的龙在山上"]
    record = read_record(captions.dataset())
    again = build_index(captions, IndexConfig())
    assert record is not None
    assert again.version == record.version
