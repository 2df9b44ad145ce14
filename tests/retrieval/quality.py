"""An index of the sample corpus' captions, and prompts whose right answers are known."""

import csv
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from imagerag.corpus.sample import Concept, load_concepts, load_drawings
from imagerag.generation.base import load_conditioner
from imagerag.retrieval.ann import Embeds
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, publish
from imagerag.retrieval.schema import EncoderIdentity, row_ids, row_schema
from imagerag.retrieval.store import Store

Prompt = tuple[str, tuple[str, ...]]
"""What is asked for, and the captions that it should find."""


class Texts:
    """The sample index's text encoder, without its image tower, which takes seconds to load."""

    def __init__(self) -> None:
        self._conditioner = load_conditioner("tiny")

    def encode(self, texts: list[str]) -> Embeds:
        parts = [self._conditioner.encode(texts[start : start + 64]).sentences for start in range(0, len(texts), 64)]
        return np.concatenate([part.numpy() for part in parts if part is not None])


def write_index(folder: Path, texts: Texts, encoder: EncoderIdentity) -> Store:
    """Publish a row for each drawing of the corpus, with its caption but without its picture."""
    drawings = load_drawings()
    captions = [drawing.concept.name for drawing in drawings]
    names = sorted(set(captions))
    embeds = dict(zip(names, texts.encode(names), strict=True))
    column = pa.FixedSizeListArray.from_arrays(np.concatenate([embeds[caption] for caption in captions]), encoder.dim)
    # No two rows alike: the images tell styles apart.
    hashes = pa.array([f"{number:064x}" for number in range(len(drawings))])
    rows = pa.table(
        {
            "id": row_ids(hashes, pa.array(captions)),
            "image_sha256": hashes,
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
    publish(store, build_index(store, IndexConfig()), PublishConfig())
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
