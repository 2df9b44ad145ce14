"""What a fine-tuning learns from, before anything is computed: which examples there are, and the tables that hold them.

An example is a picture of the index or one that the teacher makes of a prompt. Its clean latents and text features are
in a table whose key is what they depend on, so that another version of the index costs only its new rows; its
references are in another one, whose key is the index's version.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from heapq import nsmallest
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imagerag.base.files import BaseFiles, read_json, resolve
from imagerag.errors import UserError
from imagerag.hspace.cache import identity_of
from imagerag.retrieval.schema import FeatureIdentity
from imagerag.retrieval.search import Retriever
from imagerag.storage.hexadecimal import ID
from imagerag.storage.keyed_table import KeyedTable, array_field
from imagerag.training.config import SynthesizeConfig

STORED_REFERENCES = 16
"""Number of nearest references stored per example; a training chooses among them."""
_SHARED = ("in_channels", "cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")
"""UNet settings in which student and teacher must agree. A teacher for larger images runs at the student's size."""
_BATCH_ROWS = 8_192
_FEWEST_HELD_OUT = 20
"""Captions that are held out of a small index, if they are at most a fifth: the gate needs as many prompts."""
_VERSION = 2
"""Of what is computed: another one makes other tables."""


@dataclass(frozen=True)
class Examples:
    """The examples of one index version and configuration."""

    retriever: Retriever
    config: SynthesizeConfig
    folder: str
    """Of the tables."""

    @cached_property
    def base(self) -> BaseFiles:
        """The student."""
        return resolve(self.config.base)

    @cached_property
    def teacher(self) -> BaseFiles:
        """The multi-step model."""
        return resolve(self.config.teacher)

    @cached_property
    def features(self) -> FeatureIdentity:
        """Whose cached features the references have."""
        return identity_of(self.base, self.retriever.dataset.schema)

    def check(self) -> None:
        """Make sure that this can be learnt from.

        Raises:
            UserError: if student and teacher do not go together, the index has no features of the student's, or what is
                held out leaves nothing to learn from or to validate on.
        """
        student, teacher = (read_json(files.parts["unet"].files[0]) for files in (self.base, self.teacher))
        for name in _SHARED:
            if student.get(name) != teacher.get(name):
                raise UserError(
                    f"student and teacher share latents and text features: {name} is {student.get(name)} in "
                    f"{self.config.base} and {teacher.get(name)} in {self.config.teacher}"
                )
        lacking = self.retriever.count_without(self.features)
        if lacking:
            raise UserError(
                f"{lacking} rows have no features for {self.config.base}: `imagerag features --name "
                f"{self.retriever.name}` makes them"
            )
        held_out = int(self.is_held_out.sum())
        if held_out == self.rows.num_rows:
            raise UserError(f"all {held_out} rows are held out: there is nothing to learn from")
        if held_out == 0:
            raise UserError(f"nothing of the {self.rows.num_rows} rows is held out: there is nothing to validate on")

    @cached_property
    def rows(self) -> pa.Table:
        """The rows of the index in its order: `id`, `caption` and `image_sha256`."""
        return self.retriever.read(["id", "caption", "image_sha256"])

    @cached_property
    def held_out(self) -> frozenset[str]:
        """Captions that nothing is learnt from.

        Without a file, those with the smallest hashes: of an index with more captions, others are held out only if they
        are new, so that no earlier training has learnt from them.

        Raises:
            UserError: if the file with them can't be read, or the index has none of them.
        """
        captions = self.rows["caption"]
        if self.config.held_out is None:
            numbers = np.fromiter(map(_number_of, _texts(captions)), np.uint32)
            different = np.unique(numbers)  # as many as there are different captions
            fewest = min(_FEWEST_HELD_OUT, len(different) // 5)
            bound = max(self.config.held_out_share * 2**32, int(different[fewest - 1]) + 1 if fewest else 0)
            return frozenset(_texts(captions.filter(pa.array(numbers < bound))))
        listed = frozenset(read_lines(self.config.held_out))
        held_out = frozenset(caption for caption in _texts(captions) if caption.strip() in listed)
        if not held_out:
            raise UserError(f"none of the {len(listed)} captions in {self.config.held_out} is in the index")
        return held_out

    @cached_property
    def is_held_out(self) -> np.ndarray:
        """Of each row of the index (N,)."""
        found: np.ndarray = pc.is_in(self.rows["caption"], pa.array(self.held_out, pa.string())).to_numpy()
        return found

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """What the teacher makes pictures of, in turn.

        Captions are in the order of hashes, so that a new one does not change that of the others. There are at most as
        many as the teacher makes pictures.

        Raises:
            UserError: if the file with them can't be read, is empty, or has something that is held out.
        """
        if self.config.prompts is None:
            captions = (caption for caption in _texts(self.rows["caption"]) if caption not in self.held_out)
            return tuple(_first(captions, self.config.num_teacher_latents, self.config.seed))
        listed = read_lines(self.config.prompts)
        held_out = {caption.strip() for caption in self.held_out}
        forbidden = [prompt for prompt in listed if prompt in held_out]
        if forbidden or not listed:
            what = f"{forbidden[0]!r}, which is held out" if forbidden else "nothing"
            raise UserError(f"the teacher's prompts are what is learnt from; {self.config.prompts} has {what}")
        return tuple(listed)

    def teacher_rows(self) -> pa.Table:
        """Return the teacher's examples: `id`, `number` and `prompt`.

        An id, which also seeds the noise, depends on the prompt and on how often it was listed before, but not on other
        prompts. So a new caption of the index costs only its own latents.
        """
        numbers = range(self.config.num_teacher_latents)
        prompts = [self.prompts[number % len(self.prompts)] for number in numbers]
        key, count = self.teacher_table.digest, Counter[str]()
        ids = []
        for prompt in prompts:
            ids.append(_hash(f"{key}\0{count[prompt]}\0{prompt}", ID.byte_width))
            count[prompt] += 1
        return pa.table(
            {"id": pa.array(ids, ID), "number": pa.array(numbers, pa.int64()), "prompt": pa.array(prompts, pa.string())}
        )

    @cached_property
    def real_table(self) -> KeyedTable:
        """Latents of the index's pictures, which are fitted as for their features."""
        key = {"version": _VERSION, "base": self.base.identity.digest, "fit": self.features.fit}
        return KeyedTable.of(self.folder, "real", key, self._latent_columns)

    @cached_property
    def teacher_table(self) -> KeyedTable:
        """Latents that the teacher makes."""
        config = self.config
        key = {
            "version": _VERSION,
            "base": self.base.identity.digest,
            "teacher": self.teacher.identity.digest,
            "guidance_scale": config.guidance_scale,
            "num_inference_steps": config.num_inference_steps,
            "seed": config.seed,
        }
        return KeyedTable.of(self.folder, "teacher", key, self._latent_columns)

    @cached_property
    def references_table(self) -> KeyedTable:
        """Every example with its prompt's embedding by the index's encoder and its references' ids, the best first."""
        is_made = self.config.num_teacher_latents > 0
        key = {
            "version": _VERSION,
            "index": self.retriever.identity,
            "encoder": self.retriever.encoder.digest,
            "held_out": _digest("\n".join(sorted(self.held_out))),
            "teacher": self.teacher_table.digest if is_made else None,
            # The others are captions of that index, in an order that depends on the teacher's seed.
            "prompts": _digest("\n".join(self.prompts)) if is_made and self.config.prompts is not None else None,
        }
        columns = [
            pa.field("prompt", pa.string()),
            pa.field("number", pa.int64()),  # of the teacher's examples; -1 for real ones
            pa.field("is_held_out", pa.bool_()),
            pa.field("references", pa.list_(ID)),
            array_field("embed", (self.retriever.encoder.dim,), pa.float32()),
        ]
        return KeyedTable.of(self.folder, "references", key, columns)

    @property
    def _latent_columns(self) -> list[pa.Field]:
        unet = read_json(self.base.parts["unet"].files[0])
        text = (_text_length(self.base), unet["cross_attention_dim"])
        latents = (unet["in_channels"], unet["sample_size"], unet["sample_size"])
        columns = [pa.field("prompt", pa.string()), array_field("latents", latents), array_field("text", text)]
        if "text_encoder_2" in self.base.parts:
            pooled = read_json(self.base.parts["text_encoder_2"].files[0])["projection_dim"]
            columns.append(array_field("pooled", (pooled,)))
        return columns


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file that are not empty, on any fsspec path.

    Raises:
        UserError: if it can't be read.
    """
    import fsspec

    try:
        with fsspec.open(path, "r", encoding="utf-8-sig") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} has to be a readable text file: {error}") from error


def _text_length(files: BaseFiles) -> int:
    """Return how many tokens the UNet sees."""
    config: Mapping[str, Any] = read_json(Path(files.parts["tokenizer"].folder) / "tokenizer_config.json")
    return int(config["model_max_length"])


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _number_of(caption: str) -> int:
    """Return a number below 2^32 that a caption has everywhere."""
    return int.from_bytes(_hash(caption, 4), "big")


def _texts(captions: pa.ChunkedArray) -> Iterator[str]:
    """Yield the captions without making Python strings of all of them at once."""
    for chunk in captions.chunks:
        for start in range(0, len(chunk), _BATCH_ROWS):
            yield from chunk.slice(start, _BATCH_ROWS).to_pylist()


def _first(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Return the first `count` different texts in the order of their hashes; memory does not grow with the others."""
    hashes: dict[str, bytes] = {}
    bound = b"\xff" * 9  # above all hashes
    for text in texts:
        if (own := _hash(f"{seed}\0{text}")) < bound:
            hashes[text] = own
            if len(hashes) > 2 * count:
                hashes = dict(nsmallest(count, hashes.items(), key=itemgetter(1)))
                bound = max(hashes.values(), default=b"")
    return nsmallest(count, hashes, key=hashes.__getitem__)


def _hash(text: str, size: int = 8) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()
