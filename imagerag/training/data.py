"""The examples of a training set: their latents, texts and references, read from their tables as they are needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lance import LanceDataset

from imagerag.artifacts import TrainingSet
from imagerag.base.model import BaseModel
from imagerag.base.text import added_conditions
from imagerag.hspace.encode import identity_in, side_of
from imagerag.retrieval.feature_column import require_cached
from imagerag.retrieval.schema import Embeds, Features
from imagerag.retrieval.search import Retriever
from imagerag.storage.hexadecimal import to_hex
from imagerag.storage.keyed_table import Arrays, from_column, shape_of
from imagerag.training.config import ReferenceChoice
from imagerag.training.places import ExamplePlaces, Places, open_places

_KEPT_BYTES = 2**29
"""Of one column, on each worker."""

Ints = npt.NDArray[np.integer[Any]]


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


class RagData:
    """The examples of a training set, read from their tables as they are needed."""

    def __init__(self, training_set: TrainingSet, base: BaseModel, places: ExamplePlaces | None = None) -> None:
        """Open a training set.

        Args:
            training_set: what it is made of.
            base: the student, whose cached features its references have.
            places: what `find_places` returned for this training set; by default it is called now.

        Raises:
            UserError: if its tables are gone or do not hold what they should.
        """
        self._index = Retriever(training_set.index_uri, training_set.index_name, version=training_set.index_version)
        index, dim = self._index.dataset, self._index.encoder.dim
        features = identity_in(index.schema, base.identity, base.unet.config)
        self._side = side_of(base.vae, base.unet)
        require_cached(index.schema, features)
        self.places, (self._examples, *latents) = open_places(training_set, places)
        self._features = Column(index, features.column, features.shape)
        self._embeds = Column(index, "text_embed", (dim,))
        self._prompt_embeds = Column(self._examples, "embed", (dim,))
        self._latents = [_Latents(dataset) for dataset in latents]

    @property
    def learnt(self) -> Places:
        """Examples to learn from."""
        return self.places.learnt

    @property
    def held_out(self) -> Places:
        """Examples to validate on."""
        return self.places.held_out

    def prompts(self, examples: Ints) -> list[str]:
        """Return the prompts of examples (N,)."""
        prompts: list[str] = self._examples.take(examples, columns=["prompt"])["prompt"].to_pylist()
        return prompts

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
        own = self.places.own[examples]
        found = self._index.take(own[own >= 0], ["id", "image_sha256"])
        pairs = zip(to_hex(found["id"]), to_hex(found["image_sha256"]), strict=True)
        named = (f"row {id} (image {sha256})" for id, sha256 in pairs)
        return [
            next(named) if place >= 0 else f"the teacher's picture of {prompt!r}"
            for prompt, place in zip(self.prompts(examples), own, strict=True)
        ]

    def images(self) -> list[bytes]:
        """Return the encoded pictures of all rows of the index."""
        images: list[bytes] = self._index.read(["image"])["image"].to_pylist()
        return images

    def own(self, examples: Ints) -> Ints:
        """Return the rows of the index (B,) that examples are of, -1 for none."""
        rows: Ints = self.places.own[examples]
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
        strangers = rng.choice(self.places.strangers, (size, k))
        own = self.places.own[examples]
        neighbours = np.full((size, k), -1)
        found = self.places.references[examples, :k]
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
        tables, rows = self.places.latents[examples].T
        parts = [(table, tables == number) for number, table in enumerate(self._latents) if (tables == number).any()]
        order = np.argsort(np.concatenate([np.flatnonzero(mine) for _, mine in parts]))
        read = [table.read(rows[mine]) for table, mine in parts]
        columns = (np.concatenate(each)[order].astype(np.float32) for each in zip(*read, strict=True))
        return [torch.from_numpy(column) for column in columns]


class _Latents:
    """A table of examples' latents and text features."""

    def __init__(self, dataset: LanceDataset) -> None:
        names = [name for name in ("latents", "text", "pooled") if name in dataset.schema.names]
        self._columns = [Column(dataset, name, shape_of(dataset.schema.field(name))) for name in names]

    def read(self, rows: Ints) -> list[Arrays]:
        """Return the latents (N, C, H, W), text features (N, L, D), and of SDXL pooled ones (N, P), of rows (N,)."""
        return [column.read(rows) for column in self._columns]
