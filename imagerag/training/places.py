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

Words = npt.NDArray[np.uint32]
"""Ids as words of 32 bits (N, 5)."""


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


def find_places(training_set: TrainingSet) -> ExamplePlaces:
    """Return the places of a training set's examples in the newest versions of its tables.

    Raises:
        UserError: if the tables are gone or do not hold what they should.
    """
    return _find(training_set)[0]


def open_places(training_set: TrainingSet, places: ExamplePlaces | None) -> tuple[ExamplePlaces, list[LanceDataset]]:
    """Return the places of a training set's examples with its tables of references and of latents in their versions.

    Args:
        training_set: the training set.
        places: what `find_places` returned for it. Places are found anew if there are none, or if a version is gone:
            other trainings share the tables of latents, and a takedown or their clean-up may rewrite them. The
            examples are the same then, in the same order.

    Raises:
        UserError: as `find_places`.
    """
    if places is not None:
        versions = zip(_uris(training_set), places.versions, strict=True)
        tables = [table for uri, version in versions if (table := KeyedTable.at(uri).find(version)) is not None]
        if len(tables) == len(places.versions):
            return places, tables
    return _find(training_set)


def _uris(training_set: TrainingSet) -> list[str]:
    return [uri for uri in (training_set.references_uri, training_set.real_uri, training_set.teacher_uri) if uri]


def _find(training_set: TrainingSet) -> tuple[ExamplePlaces, list[LanceDataset]]:
    examples, *latents = tables = [KeyedTable.at(uri).dataset() for uri in _uris(training_set)]
    learnt, held_out = _split(examples, training_set.num_teacher)
    latents_of = _latents_of(examples, latents)
    own, references = _places_in_index(training_set, examples)
    own_of_learnt = own[learnt]
    places = ExamplePlaces(
        versions=tuple(int(table.version) for table in tables),
        latents=latents_of,
        own=own,
        references=references,
        learnt=learnt,
        held_out=held_out,
        strangers=own_of_learnt[own_of_learnt >= 0],
    )
    return places, tables


def _split(examples: LanceDataset, num_teacher: int) -> tuple[Places, Places]:
    """Return the examples to learn from, and those to validate on.

    They are sorted by id: tables keep the order in which workers were done, which a training must not depend on.
    """
    ids = read_ids(examples)
    order = pc.sort_indices(pa.FixedSizeBinaryArray.from_buffers(ID, len(ids), [None, pa.py_buffer(ids)]))
    order = order.to_numpy().astype(np.int32)
    listed = examples.to_table(columns=["number", "is_held_out"])
    order = order[listed["number"].to_numpy()[order] < num_teacher]
    held_out = listed["is_held_out"].to_numpy(zero_copy_only=False)[order]
    return order[~held_out], order[held_out]


def _latents_of(examples: LanceDataset, tables: Sequence[LanceDataset]) -> Places:
    """Return for each example its latents' table and its row there (N, 2)."""
    places = np.full((examples.count_rows(), 2), -1, np.int32)
    for number, table in enumerate(tables):
        of_table, start = IdPlaces(read_ids(table)), 0
        for batch in batches_of(examples, ["id"], _BATCH_ROWS):
            rows, own = of_table.find(batch["id"]), places[start : start + len(batch)]
            is_there = rows >= 0
            own[is_there, 0], own[is_there, 1] = number, rows[is_there]
            start += len(batch)
    lacking = int((places[:, 1] < 0).sum())
    if lacking:
        raise UserError(f"the training set lacks {lacking} latents, which were deleted: make it again")
    return places


def _places_in_index(training_set: TrainingSet, examples: LanceDataset) -> tuple[Places, Places]:
    """Return the places in the index of examples (N,) and of their references (N, K)."""
    index = Retriever(training_set.index_uri, training_set.index_name, version=training_set.index_version)
    with index.reading():
        of_index = IdPlaces(read_ids(index.dataset))
    own = np.empty(examples.count_rows(), np.int32)
    references = np.full((len(own), STORED_REFERENCES), -1, np.int32)
    start = 0
    for batch in batches_of(examples, ["id", "references"], _BATCH_ROWS):
        end, found = start + len(batch), batch["references"]
        own[start:end] = of_index.find(batch["id"])
        is_there = np.arange(STORED_REFERENCES) < pc.list_value_length(found).to_numpy()[:, None]
        places = of_index.find(pc.list_flatten(found))
        assert (places >= 0).all(), "a reference is no row of the index"
        references[start:end][is_there] = places
        start = end
    return own, references


def read_ids(dataset: LanceDataset) -> Words:
    """Return the ids of all rows as words (N, 5). They are read in batches: as a table, they would be there twice."""
    ids, start = np.empty((dataset.count_rows(), _WORDS), np.uint32), 0
    for batch in batches_of(dataset, ["id"], _BATCH_ROWS):
        for chunk in batch["id"].chunks:
            ids[start : start + len(chunk)] = to_words(chunk)
            start += len(chunk)
    return ids


class IdPlaces:
    """Finds the positions of ids in a list of ids, of which each takes 32 bytes.

    Among ten million, it finds a million in 0.18 s; Arrow's `index_in`, which hashes all of them at each call, takes
    2.3 s.
    """

    def __init__(self, ids: Words) -> None:
        """Sort ids (N, 5) by their last bits, which are evenly distributed."""
        self._words = ids
        self._mask = np.uint32((1 << max(len(self._words) - 1, 0).bit_length()) - 1)
        bits = self._words[:, -1] & self._mask
        self._order = np.argsort(bits, kind="stable").astype(np.int32)
        self._starts = np.zeros(int(self._mask) + 2, np.int32)
        np.cumsum(np.bincount(bits, minlength=int(self._mask) + 1), out=self._starts[1:])

    def find(self, ids: pa.ChunkedArray) -> Places:
        """Return where each id (N,) is first, -1 where it is not."""
        return np.concatenate([np.empty(0, np.int32), *(self._find(to_words(chunk)) for chunk in ids.chunks)])

    def _find(self, words: Words) -> Places:
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


def to_words(ids: pa.FixedSizeBinaryArray) -> Words:
    """Return ids as words (N, 5), without a copy."""
    end = ids.offset + len(ids)
    if not len(ids):
        return np.empty((0, _WORDS), np.uint32)
    return np.frombuffer(ids.buffers()[1], np.uint32, end * _WORDS).reshape(-1, _WORDS)[ids.offset :]
