"""Where the parts of a training set's examples are in their tables: found once per training, not by each worker.

Ray keeps the arrays in memory that all workers of a node share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lance import LanceDataset

from imagerag.artifacts import TrainingSet
from imagerag.errors import UserError
from imagerag.retrieval.search import Retriever
from imagerag.storage.hexadecimal import ID
from imagerag.storage.keyed_table import KeyedTable
from imagerag.storage.lance_table import batches_of
from imagerag.training.examples import STORED_REFERENCES

_BATCH_ROWS = 2**16
_WORDS = ID.byte_width // 4

Places = npt.NDArray[np.int32]
"""Rows of a table, -1 where there is none."""


@dataclass(frozen=True)
class ExamplePlaces:
    """Where the parts of examples are. An example is itself a row (N) of the training set's table of references."""

    versions: tuple[int, ...]
    """Versions of the tables of references and of latents in which these are the places."""
    latents: Places
    """Each example's table of latents and its row there (N, 2)."""
    own: Places
    """Each example's own row of the index (N,)."""
    references: Places
    """Each example's references (N, K) as rows of the index."""
    learnt: Places
    """Examples to learn from, in an order that does not depend on that of the table."""
    held_out: Places
    """Examples to validate on, likewise."""
    strangers: Places
    """Rows of the index that random references are drawn from: those of examples to learn from."""


def open_tables(training_set: TrainingSet, versions: Sequence[int] | None = None) -> list[LanceDataset]:
    """Open the tables of references and of latents, in the newest or in given versions.

    Raises:
        UserError: if a table is gone, or not in that version any more, because a takedown deleted rows.
    """
    uris = [uri for uri in (training_set.references_uri, training_set.real_uri, training_set.teacher_uri) if uri]
    tables = []
    for number, uri in enumerate(uris):
        dataset = KeyedTable.at(uri).find(None if versions is None else versions[number])
        if dataset is None:
            raise UserError(f"rows of {uri} were deleted since the training started: run it again")
        tables.append(dataset)
    return tables


def find_places(training_set: TrainingSet) -> ExamplePlaces:
    """Return the places of a training set's examples, as the tables are now.

    Raises:
        UserError: if the tables are gone or do not hold what they should.
    """
    examples, *latents = open_tables(training_set)
    listed = examples.to_table(columns=["id", "number", "is_held_out"])
    own, references = _places_in_index(training_set, examples, listed["id"])
    # Tables keep the order in which workers were done; a training must not depend on it.
    order = pc.sort_indices(listed["id"]).to_numpy().astype(np.int32)
    order = order[listed["number"].to_numpy()[order] < training_set.num_teacher]
    held_out = listed["is_held_out"].to_numpy(zero_copy_only=False)[order]
    own_of_learnt = own[order[~held_out]]
    return ExamplePlaces(
        versions=tuple(int(table.version) for table in (examples, *latents)),
        latents=_latents_of(listed["id"], latents),
        own=own,
        references=references,
        learnt=order[~held_out],
        held_out=order[held_out],
        strangers=own_of_learnt[own_of_learnt >= 0],
    )


def _places_in_index(training_set: TrainingSet, examples: LanceDataset, ids: pa.ChunkedArray) -> tuple[Places, Places]:
    """Return the places in the index of examples (N,) and of their references (N, K)."""
    index = Retriever(training_set.index_uri, training_set.index_name, version=training_set.index_version)
    of_index = IdPlaces(index.read(["id"])["id"])
    references = np.full((len(ids), STORED_REFERENCES), -1, np.int32)
    start = 0
    for batch in batches_of(examples, ["references"], _BATCH_ROWS):
        found = batch["references"]
        is_there = np.arange(STORED_REFERENCES) < pc.list_value_length(found).to_numpy()[:, None]
        places = of_index.find(pc.list_flatten(found))
        assert (places >= 0).all(), "a reference is no row of the index"
        references[start : start + len(batch)][is_there] = places
        start += len(batch)
    return of_index.find(ids), references


def _latents_of(ids: pa.ChunkedArray, tables: Sequence[LanceDataset]) -> Places:
    """Return for each example its latents' table and its row there (N, 2)."""
    places = np.full((len(ids), 2), -1, np.int32)
    for number, table in enumerate(tables):
        rows = IdPlaces(table.to_table(columns=["id"])["id"]).find(ids)
        is_there = rows >= 0
        places[is_there, 0], places[is_there, 1] = number, rows[is_there]
    lacking = int((places[:, 1] < 0).sum())
    if lacking:
        raise UserError(f"the training set lacks {lacking} latents, which were deleted: make it again")
    return places


class IdPlaces:
    """The places of ids among others. Takes 32 bytes per id.

    Among ten million, it finds a million in 0.18 s; Arrow's `index_in`, which hashes all of them at each call, takes
    2.3 s.
    """

    def __init__(self, ids: pa.ChunkedArray) -> None:
        """Sort ids by their last bits, which are evenly distributed."""
        self._words = np.concatenate([np.empty((0, _WORDS), np.uint32), *map(_words, ids.chunks)])
        self._mask = np.uint32((1 << max(len(self._words) - 1, 0).bit_length()) - 1)
        bits = self._words[:, -1] & self._mask
        self._order = np.argsort(bits, kind="stable").astype(np.int32)
        self._starts = np.zeros(int(self._mask) + 2, np.int32)
        np.cumsum(np.bincount(bits, minlength=int(self._mask) + 1), out=self._starts[1:])

    def find(self, ids: pa.ChunkedArray) -> Places:
        """Return where each id (N,) is first, -1 where it is not."""
        return np.concatenate([np.empty(0, np.int32), *(self._find(_words(chunk)) for chunk in ids.chunks)])

    def _find(self, words: npt.NDArray[np.uint32]) -> Places:
        bits = words[:, -1] & self._mask
        at, end = self._starts[bits], self._starts[bits + 1]
        places = np.full(len(words), -1, np.int32)
        sought = np.flatnonzero(at < end)
        while len(sought):
            candidates = self._order[at[sought]]
            is_same = (self._words[candidates] == words[sought]).all(axis=1)
            places[sought[is_same]] = candidates[is_same]
            sought = sought[~is_same]
            at[sought] += 1
            sought = sought[at[sought] < end[sought]]
        return places


def _words(ids: pa.FixedSizeBinaryArray) -> npt.NDArray[np.uint32]:
    """Return ids as (N, 5) words of 32 bits, without a copy."""
    end = ids.offset + len(ids)
    if not len(ids):
        return np.empty((0, _WORDS), np.uint32)
    return np.frombuffer(ids.buffers()[1], np.uint32, end * _WORDS).reshape(-1, _WORDS)[ids.offset :]
