"""What prompts find in the sample corpus: bars under the figures that `python -m tests.retrieval.quality` prints."""

import numpy as np
import pytest

from imagerag.embedding.encoder_files import resolve
from imagerag.retrieval.index import IndexConfig
from imagerag.retrieval.search import Retriever
from tests.retrieval.quality import Texts, composed_prompts, found_by, prompt_sets, ranks, write_index


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts()


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory, texts: Texts) -> Retriever:
    encoder = resolve("tiny").identity
    # Searched exactly: partitions differ from build to build, and what they cost is measured in `test_index`.
    exact = IndexConfig(exact_below=100_000)
    store = write_index(tmp_path_factory.mktemp("quality"), texts, encoder, config=exact)
    return Retriever(store.uri, store.name)


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
