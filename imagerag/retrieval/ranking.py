"""Selection of search results for the model: limits repeated captions, and covers each thing that a prompt names.

The paper takes the nearest row of one search. With at most two rows per caption, four rows include the right
concept more often if the prompt is not its name (`python -m tests.retrieval.quality`, on the sample corpus).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagerag.retrieval.search import Neighbour

MOST_OF_ONE_CAPTION = 2
_RANK_CONSTANT = 60
"""Constant of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""
_BETWEEN_THINGS = re.compile(
    r"(?:\s*(?:[,;+&]|(?<![\w-])(?:and|with|next to|in front of|on top of|beside|behind|between|near|under|over|above"
    r"|below|on|in|inside|at|holding|wearing|riding|eating|carrying)(?![\w-]))\s*)+",
    re.IGNORECASE,
)
_ARTICLES = re.compile(r"^(?:an?|the|some|two|three|four|and)\s+", re.IGNORECASE)


def split_phrases(prompt: str) -> list[str]:
    """Return the things that a prompt names, without articles; empty if it names only one.

    Splits at punctuation and at English conjunctions and prepositions; in other languages, a prompt is one thing.
    """
    parts = [_ARTICLES.sub("", part.strip()) for part in _BETWEEN_THINGS.split(prompt)]
    phrases = list(dict.fromkeys(part for part in parts if part))
    return phrases if len(phrases) > 1 else []


def diversify(ranking: "Sequence[Neighbour]", k: int, most: int = MOST_OF_ONE_CAPTION) -> "list[Neighbour]":
    """Return `k` rows, nearest first, with at most `most` rows per caption as long as there are others."""
    seen: Counter[str] = Counter()
    chosen: list[Neighbour] = []
    spare: list[Neighbour] = []
    for row in ranking:
        seen[row.caption] += 1
        (chosen if seen[row.caption] <= most else spare).append(row)
    kept = {row.id for row in [*chosen, *spare][:k]}
    return [row for row in ranking if row.id in kept]


def merge(rankings: "Sequence[Sequence[Neighbour]]", k: int) -> "list[Neighbour]":
    """Return the `k` best rows of several searches by reciprocal rank fusion; ties go to the earlier search.

    A row's `score` is the fused score, its `similarity` the highest of all searches.
    """
    scores: dict[str, float] = {}
    best: dict[str, Neighbour] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, 1):
            scores[row.id] = scores.get(row.id, 0.0) + 1 / (_RANK_CONSTANT + rank)
            if row.id not in best or (row.similarity or 0) > (best[row.id].similarity or 0):
                best[row.id] = row
    first = sorted(scores, key=lambda each: -scores[each])[:k]
    return [replace(best[each], score=scores[each]) for each in first]
