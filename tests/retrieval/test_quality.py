"""What prompts find in the sample corpus. The bars lie under what was measured; `make bench` prints the figures."""

import numpy as np
import pytest

from imagerag.embedding.spec import resolve
from imagerag.retrieval.ranking import diversify, merge, split_phrases
from imagerag.retrieval.search import Retriever
from tests.retrieval.quality import Prompt, Texts, composed_prompts, prompt_sets, ranks, write_index


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts()


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory, texts: Texts) -> Retriever:
    encoder = resolve("tiny").identity
    store = write_index(tmp_path_factory.mktemp("quality"), texts, encoder)
    return Retriever(store.uri, store.name)


def found_by(retriever: Retriever, texts: Texts, prompts: list[Prompt], *, compose: bool) -> list[list[str]]:
    """The captions of four references, as the pipeline finds them."""
    phrases = [[prompt, *(split_phrases(prompt) if compose else [])] for prompt, _ in prompts]
    near = retriever.search(texts.encode([phrase for own in phrases for phrase in own]), 12)
    each = iter(diversify(ranking, 4, 2) for ranking in near)
    rankings = [[next(each) for _ in own] for own in phrases]
    return [[row.caption for row in (own[0] if len(own) == 1 else merge(own, 4))] for own in rankings]


@pytest.mark.parametrize(
    ("name", "first", "among_four"),
    [
        ("name", 0.99, 0.99),
        ("a drawing of a <name>", 0.95, 0.97),
        ("<name> emoji, noto style", 0.90, 0.97),
        ("<name>, <keyword>", 0.95, 0.97),
        # The encoder knows what many of these mean, and of many it does not. Chance is 0.0006.
        ("written paraphrase", 0.28, 0.45),
        ("two keywords", 0.08, 0.18),
    ],
)
def test_prompts_find_their_concept(
    retriever: Retriever, texts: Texts, name: str, first: float, among_four: float
) -> None:
    prompts = prompt_sets()[name]
    found = list(ranks(found_by(retriever, texts, prompts, compose=False), prompts))
    assert np.mean([rank == 0 for rank in found]) >= first
    assert np.mean([rank is not None for rank in found]) >= among_four


def test_composition_finds_both_concepts_more_often(retriever: Retriever, texts: Texts) -> None:
    prompts = composed_prompts()
    both = {
        compose: np.mean([r is not None for r in ranks(found_by(retriever, texts, prompts, compose=compose), prompts)])
        for compose in (False, True)
    }
    assert both[True] >= 0.65
    assert both[True] - both[False] >= 0.04, "measured: 0.715 and 0.624"
