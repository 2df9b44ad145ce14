"""What prompts find in an index of the sample corpus, as a table: `python -m tests.retrieval.quality`."""

import csv
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from imagerag.base.model import load_conditioner
from imagerag.embedded.sample import Concept, Drawing, load_concepts, load_drawings
from imagerag.embedding.encoder_files import resolve
from imagerag.evaluation.intervals import estimate
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, publish
from imagerag.retrieval.ranking import diversify, merge, split_phrases
from imagerag.retrieval.schema import Embeds, EncoderIdentity, row_ids, row_schema
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.storage.hexadecimal import SHA256, from_hex

Prompt = tuple[str, tuple[str, ...]]
"""What is asked for, and the captions that it should find."""


class Texts:
    """The sample index's text encoder, without its image tower, which takes seconds to load."""

    def __init__(self) -> None:
        self._conditioner = load_conditioner("tiny")

    def encode(self, texts: list[str]) -> Embeds:
        """Return the embeddings (N, D). Those of like length are encoded together: padding is most of the work."""
        ((tokenizer, _),) = self._conditioner._towers
        longest = tokenizer.model_max_length
        lengths = np.array([len(tokens) for tokens in tokenizer(texts, truncation=True).input_ids])
        order = np.argsort(lengths, kind="stable")
        parts = []
        try:
            for some in np.split(order, range(64, len(order), 64)):
                tokenizer.model_max_length = int(lengths[some].max())
                parts.append(self._conditioner.encode([texts[place] for place in some]).sentences)
        finally:
            tokenizer.model_max_length = longest
        made = np.concatenate([part.numpy() for part in parts if part is not None])
        return made[np.argsort(order)]


def found_by(retriever: Retriever, texts: Texts, prompts: list[Prompt], *, compose: bool) -> list[list[str]]:
    """The captions of four references, as the pipeline finds them."""
    phrases = [[prompt, *(split_phrases(prompt) if compose else [])] for prompt, _ in prompts]
    near = retriever.search(texts.encode([phrase for own in phrases for phrase in own]), 8)
    each = iter(diversify(ranking, 4, 2) for ranking in near)
    rankings = [[next(each) for _ in own] for own in phrases]
    return [[row.caption for row in (own[0] if len(own) == 1 else merge(own, 4))] for own in rankings]


def write_index(
    folder: Path,
    texts: Texts,
    encoder: EncoderIdentity,
    drawings: Sequence[Drawing] = (),
    config: IndexConfig | None = None,
) -> Store:
    """Publish a row for each drawing, by default of the whole corpus. Searched by captions only: see `image_embed`."""
    drawings = drawings or load_drawings()
    captions = [drawing.concept.name for drawing in drawings]
    names = sorted(set(captions))
    embeds = dict(zip(names, texts.encode(names), strict=True))
    column = pa.FixedSizeListArray.from_arrays(np.concatenate([embeds[caption] for caption in captions]), encoder.dim)
    # No two rows alike: the images tell styles apart.
    hashes = pa.array([f"{number:064x}" for number in range(len(drawings))])
    rows = pa.table(
        {
            "id": row_ids(hashes, pa.array(captions)),
            "image_sha256": from_hex(hashes.to_pylist(), SHA256),
            "url": [f"https://example.org/{number}" for number in range(len(drawings))],
            "source": [drawing.style.title for drawing in drawings],
            "licence": [drawing.style.licence for drawing in drawings],
            "caption": captions,
            "width": [64] * len(drawings),
            "height": [64] * len(drawings),
            "image": [drawing.image for drawing in drawings],
            "text_embed": column,
            "image_embed": column,
        },
        schema=row_schema(encoder),
    )
    store = Store(str(folder), "sample")
    store.open_or_create(encoder)
    with store.writer_lock():
        store.commit(store.write_fragments(rows), store.version)
    publish(store, build_index(store, config or IndexConfig()), PublishConfig())
    return store


def prompt_sets() -> dict[str, list[Prompt]]:
    """Prompts on held-out concepts: their names, and other ways to ask for them."""
    concepts = {concept.codepoint: concept for concept in load_concepts() if concept.split == "held_out"}
    every = list(concepts.values())
    rng = random.Random(0)
    with Path(__file__).with_name("paraphrases.csv").open(newline="") as file:
        paraphrases = [(row["prompt"], (concepts[row["codepoint"]].name,)) for row in csv.DictReader(file)]
    with_keywords = [(concept, own) for concept in every if (own := _other_keywords(concept))]
    return {
        "name": [(concept.name, (concept.name,)) for concept in every],
        "a drawing of a <name>": [(f"a drawing of a {concept.name}", (concept.name,)) for concept in every],
        "<name> emoji, noto style": [(f"{concept.name} emoji, noto style", (concept.name,)) for concept in every],
        "<name>, <keyword>": [
            (f"{concept.name}, {rng.choice(own)}", (concept.name,)) for concept, own in with_keywords
        ],
        "two keywords": [
            (" ".join(rng.sample(own, 2)), (concept.name,)) for concept, own in with_keywords if len(own) > 1
        ],
        "written paraphrase": paraphrases,
    }


def composed_prompts() -> list[Prompt]:
    """Prompts that name two held-out concepts."""
    names = [concept.name for concept in load_concepts() if concept.split == "held_out"]
    random.Random(0).shuffle(names)
    links = ("a {} and a {}", "a {} next to a {}", "a {} with a {}", "a {}, a {}")
    return [(links[number % 4].format(*pair), pair) for number, pair in enumerate(pairwise(names))]


def _other_keywords(concept: Concept) -> list[str]:
    own = set(concept.name.lower().replace(":", "").replace(",", "").split())
    return [keyword for keyword in concept.keywords if not set(keyword.split()) & own]


def ranks(found: list[list[str]], prompts: list[Prompt]) -> Iterator[int | None]:
    """Yield the rank, from 0, of the last of the captions that each prompt should find; None if one is missing."""
    for captions, (_, right) in zip(found, prompts, strict=True):
        places = [captions.index(each) if each in captions else None for each in right]
        yield None if None in places else max(place for place in places if place is not None)


def main() -> None:
    """Print the table."""
    texts = Texts()
    lines = ["| prompts | number | first | among four | among four, `--compose` |", "|---|---:|---|---|---|"]
    with TemporaryDirectory() as folder:
        store = write_index(Path(folder), texts, resolve("tiny").identity)
        retriever = Retriever(store.uri, store.name)
        for name, prompts in {**prompt_sets(), "two concepts, both of them": composed_prompts()}.items():
            own, composed = (
                list(ranks(found_by(retriever, texts, prompts, compose=compose), prompts)) for compose in (False, True)
            )
            first = "" if len(prompts[0][1]) > 1 else str(estimate([rank == 0 for rank in own]))
            among = [str(estimate([rank is not None for rank in each])) for each in (own, composed)]
            lines.append(f"| {name} | {len(prompts)} | {first} | {among[0]} | {among[1]} |")
    print("\n".join(lines).replace("<", "\\<"))


if __name__ == "__main__":
    main()
