"""Generation of the evaluation's pictures on Ray, cached in one table per way.

A table's key covers everything that its pictures depend on. So another candidate costs only its own pictures, and a
stopped evaluation resumes.
"""

import hashlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from imagerag.artifacts import IndexVersion
from imagerag.evaluation.config import EvaluateConfig
from imagerag.evaluation.feature_job import Source
from imagerag.evaluation.results import Latency
from imagerag.evaluation.ways import Way
from imagerag.generation.references import Reference
from imagerag.generation.sheet import to_png
from imagerag.progress import OnProgress
from imagerag.settings import Settings
from imagerag.storage.files import local_copy
from imagerag.storage.hexadecimal import ID, to_hex
from imagerag.storage.keyed_table import KeyedTable
from imagerag.storage.lance_table import rows_with
from imagerag.workers import Dtype, Job, run_job

if TYPE_CHECKING:
    import torch

    from imagerag.evaluation.timed import TimedPipeline
    from imagerag.generation.pipeline import ImageRAGTurboPipeline

VERSION = 5
"""Version of the generation code; a change makes new tables."""
_ROWS_OF_A_TASK = 64
_COLUMNS = (
    pa.field("prompt", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("image", pa.large_binary()),
    pa.field("references", pa.string()),
)
_TIMING = "timing"
"""Stands for a way in the batch that measures the latency of all ways."""
_PARTS = ("text", "retrieval", "denoising", "decoding")
_TIMED_PROMPTS = 8
_FEWEST_TIMED = 3
_TIMED_S = 4.0
"""Time budget per way; no further pair starts after it."""


class PictureJob:
    """Makes the pictures of all prompts in all ways, and measures latencies."""

    def __init__(self, prompts: Sequence[str], ways: Sequence[Way], config: EvaluateConfig, folder: str) -> None:
        """Initialise the job.

        Args:
            prompts: the evaluation's prompts.
            ways: the ways to make each prompt's pictures.
            config: pictures per prompt, seed and workers.
            folder: URI of the folder with the tables of pictures.
        """
        self.ways, self.images_per_prompt = ways, config.images_per_prompt
        self._config = config
        key = {"version": VERSION, "device": config.device, "dtype": config.dtype}
        self._tables = {way.name: KeyedTable.of(folder, "pictures", key | way.key(), _COLUMNS) for way in ways}
        seeds = [
            _seed_of(prompt, number, config.seed) for prompt in prompts for number in range(self.images_per_prompt)
        ]
        repeated = [prompt for prompt in prompts for _ in range(self.images_per_prompt)]
        self._wanted = pa.table({"id": pa.array(map(_row_id, repeated, seeds), ID), "prompt": repeated, "seed": seeds})

    def run(self, settings: Settings, on_progress: OnProgress) -> dict[str, Latency]:
        """Make the missing pictures, and return the latency of each way."""
        distinct = {table.name: name for name, table in self._tables.items()}  # ways that are the same have one table
        versions = {name: self._tables[name].version for name in distinct.values()}
        missing = {name: self._missing(self._tables[name]) for name in distinct.values()}
        for name, rows in missing.items():
            if rows.num_rows:
                self._tables[name].clean_up()
        total = int(sum(rows.num_rows for rows in missing.values()))
        parts = [
            part.append_column("way", pa.array([name] * part.num_rows))
            for name, rows in missing.items()
            for part in (rows.slice(start, _ROWS_OF_A_TASK) for start in range(0, rows.num_rows, _ROWS_OF_A_TASK))
        ]
        timed = self._wanted.slice(0, _TIMED_PROMPTS)
        parts.append(timed.append_column("way", pa.array([_TIMING] * timed.num_rows)))
        latencies: dict[str, Latency] = {}
        way = ""  # of the last result

        def commit(results: list[str]) -> None:
            nonlocal way
            for result in map(json.loads, results):
                way = result["way"]
                if way == _TIMING:
                    latencies.update({name: Latency(**own) for name, own in result["latencies"].items()})
                else:
                    versions[way] = self._tables[way].commit(result["fragments"], versions[way])

        def report(done: int) -> None:
            if way != _TIMING:
                on_progress(done, total, way)

        arguments = {"ways": self.ways, "tables": self._tables, "config": self._config}
        job = Job(parts=parts, worker=Worker, arguments=arguments, num_rows=total, commit=commit, on_done=report)
        run_job(job, self._config, settings)
        return latencies

    @property
    def num_pictures(self) -> int:
        """Number of pictures of each way."""
        return int(self._wanted.num_rows)

    def source(self, way: Way) -> Source:
        """Return a way's pictures as input of networks."""
        return Source(table=self._tables[way.name], rows=self._wanted.select(["id", "prompt"]))

    def image(self, way: Way, number: int) -> Image.Image:
        """Return a picture of a way."""
        rows = rows_with(self._tables[way.name].dataset(), "id", self._wanted["id"].slice(number, 1), ["image"])
        return Image.open(io.BytesIO(rows["image"][0].as_py()), formats=["PNG"]).convert("RGB")

    def references(self, way: Way) -> list[tuple[Reference, ...]]:
        """Return the references of each of a way's pictures."""
        rows = self._tables[way.name].dataset().to_table(columns=["id", "references"])
        texts = rows["references"].take(pc.index_in(self._wanted["id"], value_set=rows["id"]))
        return [tuple(Reference(**each) for each in json.loads(text)) for text in texts.to_pylist()]

    def _missing(self, table: KeyedTable) -> pa.Table:
        present = table.ids()
        return self._wanted.filter(pc.invert(pc.is_in(self._wanted["id"], present)))


class Worker:
    """Makes pictures and writes them as fragments; pipelines are loaded on first use."""

    def __init__(
        self,
        *,
        ways: Sequence[Way],
        tables: dict[str, KeyedTable],
        config: EvaluateConfig,
        device: str,
        dtype: Dtype | None,
    ) -> None:
        self._ways: dict[str, Way] = {way.name: way for way in ways}
        self._tables, self._config, self._device, self._dtype = tables, config, device, dtype
        self._pipelines: dict[tuple[str, str | None, IndexVersion | None], TimedPipeline] = {}
        self._ids: pa.ChunkedArray | None = None
        """Ids of all rows of the index, sorted, so that the order of the rows in the table does not matter."""

    def __call__(self, rows: pa.Table) -> tuple[list[str], int]:
        """Return the `way` with its `fragments` or with the `latencies`, as JSON, and the number of pictures."""
        name, size = rows["way"][0].as_py(), self._config.batch_size
        if name == _TIMING:
            return [json.dumps({"way": name, "latencies": self._time_all(rows["prompt"].to_pylist())})], 0
        made = [self._make(self._ways[name], rows.slice(start, size)) for start in range(0, rows.num_rows, size)]
        fragments = self._tables[name].write_fragments(pa.concat_tables(made))
        return [json.dumps({"way": name, "fragments": fragments})], rows.num_rows

    def _make(self, way: Way, rows: pa.Table) -> pa.Table:
        pipeline, prompts = self._pipeline(way), rows["prompt"].to_pylist()
        generators = list(map(_generator, rows["seed"].to_pylist()))
        output = pipeline(prompts, generator=generators, **self._arguments(way, prompts, pipeline))
        references = [json.dumps([asdict(each) for each in own]) for own in output.references]
        images = pa.array(list(map(to_png, output.images)), pa.large_binary())
        return rows.drop_columns(["way"]).append_column("image", images).append_column("references", [references])

    def _time_all(self, prompts: list[str]) -> dict[str, dict[str, float]]:
        """Return the `Latency` of each column; `best_slerp` has slerp's, as w does not change the time."""
        slerp = next(way for way in self._ways.values() if way.curve == "slerp")
        timed = {way.name: way for way in self._ways.values() if way.is_column} | {"best_slerp": slerp}
        return {name: self._time_pairs(way, prompts) for name, way in timed.items()}

    def _time_pairs(self, way: Way, prompts: list[str]) -> dict[str, float]:
        """Time a way and the base model in alternation, so that both of a pair see the same load on the machine."""
        pairs: list[list[list[float]]] = []
        started = time.perf_counter()
        for number, prompt in enumerate([prompts[0], *prompts]):
            pair = (self._ways["base"], way)
            timed = [self._time(each, prompt, number) for each in (pair if number % 2 else pair[::-1])]
            pairs.append(timed if number % 2 else timed[::-1])
            if number >= _FEWEST_TIMED and time.perf_counter() - started > _TIMED_S:
                break
        measured = np.array(pairs[1:])  # the first pair is a warm-up
        latency = dict(zip((*_PARTS, "total"), (1000 * np.median(measured[:, 1], axis=0)).tolist(), strict=True))
        return latency | {"slowdown": float(np.median(measured[:, 1, -1] / measured[:, 0, -1]))}

    def _time(self, way: Way, prompt: str, seed: int) -> list[float]:
        """Return the seconds of one picture by part (`_PARTS`), then in total."""
        pipeline = self._pipeline(way)
        arguments = self._arguments(way, [prompt], pipeline)
        pipeline.seconds.clear()
        started = time.perf_counter()
        pipeline(prompt, generator=_generator(seed), **arguments)
        total = time.perf_counter() - started
        parts = [pipeline.seconds.get(part, 0.0) for part in _PARTS[1:]]
        return [total - sum(parts), *parts, total]

    def _pipeline(self, way: Way) -> "TimedPipeline":
        # A way without references shares the pipeline of a way with the same model and an index.
        indexes = (each.index for each in self._ways.values() if (each.base, each.adapter) == (way.base, way.adapter))
        index = way.index or next((index for index in indexes if index is not None), None)
        known = (way.base, way.adapter, index)
        if known not in self._pipelines:
            from imagerag.base.model import load_base
            from imagerag.evaluation.timed import TimedPipeline
            from imagerag.generation.finetuned import load_finetuned
            from imagerag.generation.pipeline import ImageRAGTurboPipeline

            base, adapter = load_base(way.base, self._device, self._dtype), None
            if way.adapter is not None:
                with local_copy(way.adapter) as folder:
                    adapter = load_finetuned(folder, base)
            pipeline = ImageRAGTurboPipeline.from_base(base, adapter)
            pipeline.set_progress_bar_config(disable=True)
            if index is not None:
                pipeline.use_index(index.uri, index.name, index.version)
            self._pipelines[known] = TimedPipeline(pipeline)
        return self._pipelines[known]

    def _arguments(self, way: Way, prompts: list[str], pipeline: "TimedPipeline") -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "fusion": way.fusion,
            "num_references": way.num_references,
            "num_inference_steps": way.steps,
            "guidance_scale": way.guidance,
        }
        arguments |= {"slerp": {"w": way.w}, "adapter": {"adapter_scale": way.adapter_scale}}.get(way.fusion, {})
        if way.is_random:
            count = arguments.pop("num_references")
            arguments["reference_ids"] = [self._random_ids(prompt, count, pipeline.pipeline) for prompt in prompts]
        return arguments

    def _random_ids(self, prompt: str, count: int, pipeline: "ImageRAGTurboPipeline") -> list[str]:
        if self._ids is None:
            assert pipeline.index is not None
            ids = pipeline.index.retriever.read(["id"])["id"]
            self._ids = ids.take(pc.sort_indices(ids))
        rng = np.random.default_rng(_seed_of(prompt, -1, self._config.seed))
        return to_hex(self._ids.take(rng.choice(len(self._ids), min(count, len(self._ids)), replace=False)))


def _generator(seed: int) -> "torch.Generator":
    import torch

    return torch.Generator().manual_seed(seed)


def _seed_of(prompt: str, number: int, seed: int) -> int:
    """Return a seed that depends on the prompt, its picture's number and `seed`, but not on other prompts."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{number}\0{prompt}".encode()).digest()[:4])


def _row_id(prompt: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()[: ID.byte_width]
