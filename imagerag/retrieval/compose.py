"""Prompts that name several things: one search for each, merged by rank. The paper searches once."""

import re
from collections.abc import Sequence
from dataclasses import replace

from imagerag.retrieval.search import Neighbour

_RANK_CONSTANT = 60
"""Of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""
_BETWEEN_THINGS = re.compile(
    r"\s*[,;+&]\s*|\s+(?:and|with|next to|in front of|on top of|beside|behind|between|near|under|over|above|below|on|in"
    r"|inside|at|holding|wearing|riding|eating|carrying)\s+",
    re.IGNORECASE,
)
_ARTICLES = re.compile(r"^(?:an?|the|some|two|three|four|and)\s+", re.IGNORECASE)


def split_phrases(prompt: str) -> list[str]:
    """Return the things that a prompt names, each without its article; none if it names only one.

    By conjunctions, prepositions and punctuation, so in English; another language's prompt is one thing.
    """
    parts = [_ARTICLES.sub("", part.strip()) for part in _BETWEEN_THINGS.split(prompt)]
    phrases = list(dict.fromkeys(part for part in parts if part))
    return phrases if len(phrases) > 1 else []


def merge(rankings: Sequence[Sequence[Neighbour]], k: int) -> list[Neighbour]:
    """Return the `k` best rows of several searches by reciprocal rank fusion; of equals, the earlier search's is first.

    A row's `score` is the fused one, its `similarity` the highest that any search gave it.
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
