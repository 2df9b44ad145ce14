"""Make what a fine-tuning learns from: clean latents, text features and references of every example, each once.

Ray Data hands examples to workers that hold a model each. A worker writes what it made to files that belong to no
version of their table yet; the driver commits them every minute. So a job that dies loses a minute and what its workers
had in hand, and the next one computes what is missing.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imagerag.artifacts import TrainingSet
from imagerag.progress import OnProgress, silent
from imagerag.retrieval.pins import JOB, held
from imagerag.retrieval.ranking import diversify
from imagerag.retrieval.schema import Fit
from imagerag.retrieval.search import Neighbour, Retriever
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import reachable_rows
from imagerag.settings import Settings
from imagerag.storage.hexadecimal import ID, SHA256
from imagerag.storage.keyed_table import KeyedTable, to_column
from imagerag.storage.locks import writer_lock
from imagerag.training.config import SynthesizeConfig
from imagerag.training.examples import STORED_REFERENCES, Examples
from imagerag.workers import Dtype, Job, run_job

if TYPE_CHECKING:
    import torch

    from imagerag.base.text import TextConditioner

_CANDIDATES = 4 * STORED_REFERENCES
_ROWS_OF_A_TASK = 256
"""What is lost when a worker dies, at most."""


def synthesize(
    name: str,
    config: SynthesizeConfig,
    settings: Settings,
    on_progress: OnProgress = silent,
    *,
    index_version: int | None = None,
) -> TrainingSet:
    """Bring the training set of the corpus `name` to what a version of its index, by default the published one, says.

    What is there already is left alone. Where nothing is missing, neither Ray nor a model is started.

    Args:
        on_progress: is told of rows.

    Raises:
        UserError: if there is no such index or model, or nothing can be learnt from them.
        StalledError: if the workers hang. Calling again goes on where they stopped.
    """
    started = time.perf_counter()
    retriever = Retriever(settings.index_uri, name, version=index_version)
    examples = Examples(retriever, config, settings.training_of(name))
    examples.check()
    store, version = Store(settings.index_uri, name), examples.retriever.version
    with writer_lock(settings.training_of(name), "training"), held(store, version, f"{JOB}synthesis"):
        drop_unreachable(examples.real_table, store)
        num_added, machine_s = _fill(examples, settings, on_progress)
    duration_s = time.perf_counter() - started
    return replace(describe(examples), num_added=num_added, duration_s=duration_s, machine_s=machine_s)


def drop_unreachable(latents: KeyedTable, store: Store) -> None:
    """Delete the latents of rows that are in no version of the index that is kept.

    Versions that a training has pinned are kept: it reads the latents of their rows until it ends.
    """
    latents.keep(reachable_rows(store, {"id": latents.ids()})["id"])


def _fill(examples: Examples, settings: Settings, on_progress: OnProgress) -> tuple[int, float]:
    """Make what is missing, and return how many rows that was and the workers' seconds."""
    config = examples.config
    lacking = [each for each in _lacking(examples) if each.rows.num_rows]
    num_missing, num_done, machine_s = sum(each.rows.num_rows for each in lacking), 0, 0.0
    for each in lacking:

        def report(done: int, before: int = num_done, what: str = each.what) -> None:
            on_progress(before + done, num_missing, what)

        each.table.clean_up()
        job = Job(
            parts=[each.rows.slice(start, _ROWS_OF_A_TASK) for start in range(0, each.rows.num_rows, _ROWS_OF_A_TASK)],
            worker=each.worker,
            arguments={"batch_size": config.batch_size, **each.arguments},
            num_rows=each.rows.num_rows,
            commit=each.commit,
            commit_every_s=config.commit_every_s,
            on_done=report,
        )
        machine_s += run_job(job, config, settings)
        num_done += job.num_rows
    return num_missing, machine_s


def describe(examples: Examples) -> TrainingSet:
    """Return the training set of these examples, which need not be made yet."""
    retriever, config = examples.retriever, examples.config
    return TrainingSet(
        index_uri=retriever.uri,
        index_name=retriever.name,
        index_version=retriever.version,
        base=config.base,
        base_digest=examples.base.identity.digest,
        teacher=config.teacher,
        teacher_digest=examples.teacher.identity.digest,
        real_uri=examples.real_table.table_uri,
        teacher_uri=examples.teacher_table.table_uri if config.num_teacher_latents else None,
        references_uri=examples.references_table.table_uri,
        num_real=examples.rows.num_rows,
        num_teacher=config.num_teacher_latents,
        num_held_out=int(examples.is_held_out.sum()),
        num_added=0,
    )


class _Lacking:
    """The rows that one table lacks, and who makes them."""

    def __init__(self, table: KeyedTable, rows: pa.Table, worker: type, what: str, arguments: dict[str, Any]) -> None:
        self.version = table.version
        present = table.ids()
        self.table, self.worker, self.what, self.arguments = table, worker, what, arguments
        # A prompt's text is encoded, and its references are searched, once for all its rows that follow each other.
        self.rows = rows.filter(pc.invert(pc.is_in(rows["id"], present))).sort_by("prompt")

    def commit(self, fragments: list[str]) -> None:
        """Add to the table what workers wrote."""
        self.version = self.table.commit(fragments, self.version)


def _lacking(examples: Examples) -> Iterator[_Lacking]:
    rows, retriever = examples.rows, examples.retriever
    index = {"uri": retriever.uri, "name": retriever.name, "version": retriever.version}
    numbered = pa.table({"id": rows["id"], "prompt": rows["caption"], "row": np.arange(rows.num_rows)})
    config = examples.config
    table = examples.real_table
    arguments = {"table": table, "base": config.base, "fit": examples.features.fit, **index}
    yield _Lacking(table, numbered, RealWorker, "latents of pictures", arguments)
    listed = pa.table(
        {
            "id": rows["id"],
            "prompt": rows["caption"],
            "number": pa.array(np.full(rows.num_rows, -1)),
            "is_held_out": pa.array(examples.is_held_out),
            "image_sha256": rows["image_sha256"],
        }
    )
    if config.num_teacher_latents:
        made = examples.teacher_rows()
        table = examples.teacher_table
        arguments = {"table": table, "base": config.base, "config": config}
        yield _Lacking(table, made, TeacherWorker, "latents by the teacher", arguments)
        made = made.append_column("is_held_out", pa.array(np.zeros(made.num_rows, bool)))
        made = made.append_column("image_sha256", pa.nulls(made.num_rows, SHA256))
        listed = pa.concat_tables([listed, made.select(listed.column_names)])
    table = examples.references_table
    arguments = {"table": table, "held_out": examples.held_out, **index}
    yield _Lacking(table, listed, ReferencesWorker, "references", arguments)


class _Worker(ABC):
    """Makes rows in a process of its own and writes them."""

    def __init__(self, *, table: KeyedTable, batch_size: int) -> None:
        self._table, self._batch_size = table, batch_size

    def __call__(self, rows: pa.Table) -> tuple[list[str], int]:
        """Return the fragments written and the number of rows."""
        batches = (rows.slice(start, self._batch_size) for start in range(0, rows.num_rows, self._batch_size))
        made = pa.concat_tables([self._make(batch) for batch in batches])
        return self._table.write_fragments(made), rows.num_rows

    @abstractmethod
    def _make(self, rows: pa.Table) -> pa.Table:
        """Return the rows of the table for rows of the job."""


class RealWorker(_Worker):
    """Latents and text features of rows of the index."""

    def __init__(
        self, *, base: str, fit: Fit, uri: str, name: str, version: int, device: str, dtype: Dtype | None, **common: Any
    ) -> None:
        super().__init__(**common)
        from imagerag.base.model import load_base

        self._base, self._fit = load_base(base, device, dtype), fit
        self._retriever = Retriever(uri, name, version=version)

    def _make(self, rows: pa.Table) -> pa.Table:
        from imagerag.hspace.encode import encode_latents, open_images

        images = self._retriever.take(rows["row"].to_numpy(), ["image"])["image"].to_pylist()
        latents = encode_latents(self._base.vae, self._base.unet, open_images(images), self._fit)
        return _to_rows(rows["id"], rows["prompt"], latents, self._base.conditioner)


class TeacherWorker(_Worker):
    """Latents that the teacher makes of prompts, each of its own noise, and the student's text features of them."""

    def __init__(self, *, base: str, config: SynthesizeConfig, device: str, dtype: Dtype | None, **common: Any) -> None:
        super().__init__(**common)
        from imagerag.base.model import load_base
        from imagerag.generation.pipeline import ImageRAGTurboPipeline
        from imagerag.hspace.encode import side_of

        self._pipeline = ImageRAGTurboPipeline.from_base(load_base(config.teacher, device, dtype))
        self._pipeline.set_progress_bar_config(disable=True)
        student = load_base(base, device, dtype)
        self._conditioner, self._side = student.conditioner, side_of(student.vae, student.unet)
        self._config = config

    def _make(self, rows: pa.Table) -> pa.Table:
        import torch

        config = self._config
        seeds = [seed_of(id) for id in rows["id"].to_pylist()]
        made = self._pipeline(
            rows["prompt"].to_pylist(),
            height=self._side,
            width=self._side,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        )
        return _to_rows(rows["id"], rows["prompt"], made.images, self._conditioner)


def seed_of(id: bytes) -> int:
    """Return the seed of the noise that the teacher starts an example from."""
    return int.from_bytes(id[:8], "big") >> 1


class ReferencesWorker(_Worker):
    """What examples are shown of the index: what the pipeline would find, but never the same picture.

    What is learnt from is shown nothing that is held out.
    """

    def __init__(
        self,
        *,
        held_out: frozenset[str],
        uri: str,
        name: str,
        version: int,
        device: str,
        dtype: Dtype | None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        from imagerag.embedding.encoder import load_encoder

        self._retriever = Retriever(uri, name, version=version)
        self._encoder = load_encoder(self._retriever.encoder.id, device, dtype)
        self._retriever.check_encoder(self._encoder.identity)
        self._held_out = held_out
        sha256 = self._retriever.read(["id", "image_sha256"])
        self._sha256 = dict(zip(sha256["id"].to_pylist(), sha256["image_sha256"].to_pylist(), strict=True))

    def _make(self, rows: pa.Table) -> pa.Table:
        prompts = rows["prompt"].combine_chunks().dictionary_encode()
        embeds = self._encoder.encode_texts(prompts.dictionary.to_pylist())
        found = self._retriever.search(embeds, min(_CANDIDATES, self._retriever.num_rows))
        chosen = [
            self._choose(found[prompt], own_sha256, is_held_out)
            for prompt, own_sha256, is_held_out in zip(
                prompts.indices.to_pylist(), rows["image_sha256"].to_pylist(), rows["is_held_out"].to_pylist(),
                strict=True,
            )
        ]  # fmt: skip
        return pa.table(
            {
                **{name: rows[name] for name in ("id", "prompt", "number", "is_held_out")},
                "references": pa.array([[bytes.fromhex(row.id) for row in own] for own in chosen], pa.list_(ID)),
                "embed": to_column(embeds[prompts.indices.to_numpy()]),
            }
        )

    def _choose(self, found: list[Neighbour], own_sha256: bytes | None, is_held_out: bool) -> list[Neighbour]:
        others = [
            row
            for row in found
            if self._sha256[bytes.fromhex(row.id)] != own_sha256 and (is_held_out or row.caption not in self._held_out)
        ]
        return diversify(others, STORED_REFERENCES)


def _to_rows(
    ids: pa.ChunkedArray, prompts: pa.ChunkedArray, latents: "torch.Tensor", conditioner: "TextConditioner"
) -> pa.Table:
    from imagerag.hspace.encode import to_cache

    unique = prompts.combine_chunks().dictionary_encode()
    condition = conditioner.encode(unique.dictionary.to_pylist())
    made = {"latents": latents}
    for name, own in (("text", condition.embeds), ("pooled", condition.pooled)):
        if own is not None:
            made[name] = own[unique.indices.to_numpy().copy()]
    columns = {name: to_column(to_cache(each)) for name, each in made.items()}
    return pa.table({"id": ids, "prompt": prompts, **columns})
