"""The examples of a training set: their latents, texts and references, read from their tables as they are needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from lance import LanceDataset

from imagerag.artifacts import TrainingSet
from imagerag.base.model import BaseModel
from imagerag.base.text import added_conditions
from imagerag.errors import UserError
from imagerag.hspace.encode import identity_in, side_of
from imagerag.retrieval.feature_column import require_cached
from imagerag.retrieval.schema import Embeds, Features
from imagerag.retrieval.search import Retriever
from imagerag.storage.hexadecimal import to_hex
from imagerag.storage.keyed_table import Arrays, KeyedTable, from_column, shape_of
from imagerag.storage.lance_table import batches_of
from imagerag.storage.spool import MEMORY_ROWS
from imagerag.training.config import ReferenceChoice
from imagerag.training.examples import STORED_REFERENCES

_KEPT_BYTES = 2**29
"""Of one column, on each worker."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RagBatch:
    """Rows to learn from, and what each is shown."""

    latents: torch.Tensor
    """`z_0` (B, C, H, W)."""
    noise: torch.Tensor
    """`z_T`, of the same shape."""
    text: torch.Tensor
    """`tau(p_tgt)` (B, L, D)."""
    h_references: torch.Tensor
    """`h_retr` (B, K, C, H, W)."""
    similarities: torch.Tensor
    """(B, K); -1 where there is no reference."""
    added: dict[str, torch.Tensor] = field(default_factory=dict)
    """What a UNet of SDXL is told beside the text, `text_embeds` (B, D) and `time_ids` (B, 6). Others: nothing."""

    def to(self, device: torch.device) -> "RagBatch":
        """Return the batch on `device`, without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "RagBatch":
        """Return the batch in memory from which a GPU can copy by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RagBatch":
        tensors = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "added"}
        added = {name: change(own) for name, own in self.added.items()}
        return RagBatch(**{name: change(own) for name, own in tensors.items()}, added=added)


class Column:
    """A column of arrays of one shape, read by rows' places: from memory if it is small.

    Reading files takes a part of the very cores that a step on CPUs computes with.
    """

    def __init__(self, dataset: LanceDataset, name: str, shape: Sequence[int]) -> None:
        """Open a column that has no nulls.

        Args:
            shape: of a row's array (...).
        """
        self._dataset, self._name, self._shape = dataset, name, shape
        kind = dataset.schema.field(name).type
        num_bytes = dataset.count_rows() * kind.list_size * kind.value_type.bit_width // 8
        whole = dataset.to_table(columns=[name]) if num_bytes <= _KEPT_BYTES else None
        self._kept = None if whole is None else from_column(whole[name], shape)

    def read(self, rows: Ints) -> Arrays:
        """Return the arrays (N, ...) of rows (N,)."""
        if self._kept is not None:
            return self._kept[rows]
        return from_column(self._dataset.take(rows, columns=[self._name])[self._name], self._shape)


class Texts:
    """Texts by their places, in Arrow's memory: as Python's they take twice that, on each worker."""

    def __init__(self, values: pa.ChunkedArray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, place: int) -> str:
        text: str = self._values[int(place)].as_py()
        return text


class RagData:
    """The examples of a training set, read from their tables as they are needed."""

    def __init__(self, training_set: TrainingSet, base: BaseModel) -> None:
        """Open a training set.

        Args:
            training_set: what it is made of.
            base: the student, whose cached features its references have.

        Raises:
            UserError: if its tables are gone or do not hold what they should.
        """
        self._index = Retriever(training_set.index_uri, training_set.index_name, version=training_set.index_version)
        index, dim = self._index.dataset, self._index.encoder.dim
        features = identity_in(index.schema, base.identity, base.unet.config)
        self._side = side_of(base.vae, base.unet)
        require_cached(index.schema, features)
        self._features = Column(index, features.column, features.shape)
        self._embeds = Column(index, "text_embed", (dim,))
        examples = KeyedTable.at(training_set.references_uri).dataset()
        self._prompt_embeds = Column(examples, "embed", (dim,))
        uris = [uri for uri in (training_set.real_uri, training_set.teacher_uri) if uri is not None]
        latents = [KeyedTable.at(uri).dataset() for uri in uris]
        self._latents = [_Latents(dataset) for dataset in latents]
        listed = examples.to_table(columns=["id", "prompt", "number", "is_held_out"])
        self.prompts = Texts(listed["prompt"])
        self._place = _latents_of(listed["id"], latents)
        of_index = self._index.read(["id"])["id"]
        self._own = _places_in(listed["id"], of_index)
        """Each example's own row of the index (N,), -1 where there is none."""
        self._references = _references_in(examples, of_index)

        # Tables keep the order in which workers were done; a training must not depend on it.
        order = pc.sort_indices(listed["id"]).to_numpy().astype(np.int64)
        order = order[listed["number"].to_numpy()[order] < training_set.num_teacher]
        held_out = listed["is_held_out"].to_numpy(zero_copy_only=False)[order]
        self.learnt: Ints = order[~held_out]
        """Examples to learn from."""
        self.held_out: Ints = order[held_out]
        """Examples to validate on."""
        of_learnt = self._own[self.learnt]
        self._strangers = of_learnt[of_learnt >= 0]

    def read(self, examples: Ints, references: ReferenceChoice, rng: np.random.Generator) -> RagBatch:
        """Return these examples (B,) with noise of `rng`, and references that are theirs, random or none.

        Raises:
            VersionGoneError: if a takedown deleted what would be read.
        """
        chosen = self.choose(examples, references, rng)
        present = torch.from_numpy(chosen >= 0)
        with self._index.reading():
            h, embeds = self._read_index(chosen)
            own = self._prompt_embeds.read(examples)
            latents, text, *pooled = self._read_latents(examples)
        similarities = torch.from_numpy(np.einsum("bkd,bd->bk", embeds, own))
        noise = rng.standard_normal(latents.shape, np.float32)
        return RagBatch(
            latents=latents,
            noise=torch.from_numpy(noise),
            text=text,
            h_references=torch.from_numpy(h.astype(np.float32)),
            similarities=torch.where(present, similarities, -1.0),
            added=added_conditions(pooled[0], self._side) if pooled else {},
        )

    def check(self) -> None:
        """Make sure that nothing was taken down that is learnt from: what is in memory does not tell.

        Raises:
            UserError: if a takedown deleted the index's version.
        """
        self._index.check_version()

    def describe(self, examples: Ints) -> list[str]:
        """Return which rows examples (N,) are, with the digests of their pictures."""
        own = self._own[examples]
        found = self._index.take(own[own >= 0], ["id", "image_sha256"])
        pairs = zip(to_hex(found["id"]), to_hex(found["image_sha256"]), strict=True)
        named = (f"row {id} (image {sha256})" for id, sha256 in pairs)
        return [
            next(named) if place >= 0 else f"the teacher's picture of {self.prompts[row]!r}"
            for row, place in zip(examples, own, strict=True)
        ]

    def images(self) -> list[bytes]:
        """Return the encoded pictures of all rows of the index."""
        images: list[bytes] = self._index.read(["image"])["image"].to_pylist()
        return images

    def own(self, examples: Ints) -> Ints:
        """Return the rows of the index (B,) that examples are of, -1 for none."""
        rows: Ints = self._own[examples]
        return rows

    def choose(self, examples: Ints, references: ReferenceChoice, rng: np.random.Generator) -> Ints:
        """Return what examples (B,) are shown, as rows of the index (B, K), -1 for none.

        `references` of one training draw the same numbers from `rng` whatever their shares, so that changing a share
        changes nothing for the rows that it does not concern.
        """
        size, k = len(examples), references.number
        if k == 0:
            return np.empty((size, 0), np.int64)
        fate = rng.random(size)
        strangers = rng.choice(self._strangers, (size, k))
        own = self._own[examples]
        neighbours = np.full((size, k), -1)
        found = self._references[examples, :k]
        neighbours[:, : found.shape[1]] = found
        among = np.concatenate([own[:, None], neighbours[:, : k - 1]], axis=1)
        alone = np.where(np.arange(k) == 0, own[:, None], -1)
        strangers[strangers == own[:, None]] = -1
        bounds = [*np.cumsum([references.random, references.own, references.own_among]), 1 - references.none]
        kinds = np.searchsorted(bounds, fate, side="right")
        # What has no row of its own, a picture by the teacher, is shown its neighbours.
        kinds = np.where((own < 0) & ((kinds == 1) | (kinds == 2)), 3, kinds)
        shown = np.stack([strangers, alone, among, neighbours, np.full((size, k), -1)])
        return np.asarray(shown[kinds, np.arange(size)])

    def _read_index(self, rows: Ints) -> tuple[Features, Embeds]:
        """Return the features (B, K, C, H, W) and embeddings (B, K, D) of rows (B, K), zero where there is none."""
        wanted = np.unique(rows[rows >= 0])
        place = np.searchsorted(wanted, rows[rows >= 0])
        found: list[Arrays] = []
        for column in (self._features, self._embeds):
            values = column.read(wanted)
            filled = np.zeros((*rows.shape, *values.shape[1:]), values.dtype)
            filled[rows >= 0] = values[place]
            found.append(filled)
        return found[0], found[1]

    def _read_latents(self, examples: Ints) -> list[torch.Tensor]:
        tables, rows = self._place[examples].T
        parts = [(table, tables == number) for number, table in enumerate(self._latents) if (tables == number).any()]
        order = np.argsort(np.concatenate([np.flatnonzero(mine) for _, mine in parts]))
        read = [table.read(rows[mine]) for table, mine in parts]
        columns = (np.concatenate(each)[order].astype(np.float32) for each in zip(*read, strict=True))
        return [torch.from_numpy(column) for column in columns]


def _latents_of(ids: pa.ChunkedArray, tables: Sequence[LanceDataset]) -> npt.NDArray[np.int32]:
    """Return for each example its latents' table and its row there (N, 2)."""
    places = np.full((len(ids), 2), -1, np.int32)
    for number, table in enumerate(tables):
        rows = _places_in(ids, table.to_table(columns=["id"])["id"])
        places[rows >= 0] = np.stack([np.full(len(rows), number), rows], axis=1)[rows >= 0]
    lacking = int((places[:, 1] < 0).sum())
    if lacking:
        raise UserError(f"the training set lacks {lacking} latents, which were deleted: make it again")
    return places


def _references_in(examples: LanceDataset, of_index: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """Return each example's references as rows of the index (N, K), -1 where there is none."""
    references = np.full((examples.count_rows(), STORED_REFERENCES), -1, np.int32)
    # Each batch is looked up among all ids, so about as many references are held as there are ids.
    batch_rows = max(len(of_index) // STORED_REFERENCES, MEMORY_ROWS)
    start = 0
    for batch in batches_of(examples, ["references"], batch_rows):
        found = batch["references"]
        lengths = pc.list_value_length(found).to_numpy()
        places = _places_in(pc.list_flatten(found), of_index)
        assert (places >= 0).all(), "a reference is no row of the index"
        references[start : start + len(batch)][np.arange(STORED_REFERENCES) < lengths[:, None]] = places
        start += len(batch)
    return references


def _places_in(values: pa.ChunkedArray, among: pa.ChunkedArray) -> Ints:
    """Return where each of some ids (N,) is first among others, -1 where it is not."""
    places: Ints = pc.index_in(values, value_set=among).fill_null(-1).to_numpy().astype(np.int64)
    return places


class _Latents:
    """A table of examples' latents and text features."""

    def __init__(self, dataset: LanceDataset) -> None:
        names = [name for name in ("latents", "text", "pooled") if name in dataset.schema.names]
        self._columns = [Column(dataset, name, shape_of(dataset.schema.field(name))) for name in names]

    def read(self, rows: Ints) -> list[Arrays]:
        """Return the latents (N, C, H, W), text features (N, L, D), and of SDXL pooled ones (N, P), of rows (N,)."""
        return [column.read(rows) for column in self._columns]
