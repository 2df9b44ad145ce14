"""The evaluation job: makes the pictures of every way, measures them, and writes and tracks the results."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial

import numpy as np
from PIL import Image

from imagerag.artifacts import Deployed, Evaluated, Finetuned, TrainingSet
from imagerag.base.files import resolve
from imagerag.evaluation.config import EvaluateConfig, GateMetricName, MetricName
from imagerag.evaluation.copies import measure_copies, measure_leakage, threshold_of
from imagerag.evaluation.feature_job import FeatureJob, Source
from imagerag.evaluation.made import Made
from imagerag.evaluation.metrics import Pictures, Real, real_rows
from imagerag.evaluation.networks import NetworkName, check_networks
from imagerag.evaluation.no_training import choose_ws, with_chosen_ws
from imagerag.evaluation.page import to_files
from imagerag.evaluation.pictures import VERSION, PictureJob
from imagerag.evaluation.prompts import Prompts, read_prompts
from imagerag.evaluation.recognition import Floats
from imagerag.evaluation.results import JUDGES, RESULTS, CurvePoint, Latency, Results, Retrieval, Score, WayResults
from imagerag.evaluation.suite import Suite
from imagerag.evaluation.ways import Way, ways_of
from imagerag.evaluation.weights import digests_of
from imagerag.generation.references import Reference
from imagerag.hspace.cache import identity_of
from imagerag.progress import OnProgress, silent
from imagerag.retrieval.pins import JOB, held
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.files import read_json, write_file, write_json
from imagerag.storage.hexadecimal import to_hex
from imagerag.storage.locks import writer_lock
from imagerag.training.finetune import training_set_of
from imagerag.training.tracking import MlflowTracker, lasting_run, log_index, tracking_uri

EXPERIMENT = "evaluate"
_INDEX = "index"
"""Name of the real pictures among the sources of features."""
_VERSION = 3
"""Version of the measurements; a change repeats every evaluation, but not its pictures."""


def evaluate(
    finetuned: Finetuned,
    config: EvaluateConfig,
    settings: Settings,
    on_progress: OnProgress = silent,
    *,
    champion: Deployed | None = None,
    metric: GateMetricName = "recognised",
) -> Evaluated:
    """Compare an adapter on the published index with its base model, slerp, the teacher and the champion.

    Idempotent: existing pictures are reused, and a finished evaluation is returned at once.

    Args:
        finetuned: the candidate.
        config: what is generated and measured.
        settings: locations of the index, the evaluations and MLflow.
        on_progress: progress callback, called for pictures and then for measured ways.
        champion: the champion, if there is one.
        metric: the gate's metric, by which slerp's w is chosen.

    Raises:
        UserError: if the training, its index, the prompts or a metric's files are missing or invalid.
        StalledError: if the workers hang. Calling again resumes.
    """
    started = time.perf_counter()
    inputs = _Inputs.of(finetuned, config, settings, champion, metric)
    folder = f"{inputs.parent}/{inputs.key}"
    version = inputs.retriever.version
    # One evaluation at a time: they share the tables of pictures.
    with writer_lock(inputs.parent, "pictures"), held(inputs.store, version, f"{JOB}evaluation-{inputs.key}"):
        if (known := read_json(f"{folder}/{RESULTS}")) is not None:
            done = Evaluated(**known["evaluated"])
            seconds = time.perf_counter() - started
            return replace(done, uri=folder, adapter=finetuned.uri, is_new=False, duration_s=seconds)
        results, pictures = _measure(inputs, settings, on_progress)
        files = to_files(results, pictures, inputs.retriever)
        run_id = _track(inputs, results, files, settings)
        log_index(settings, run_id, inputs.store, version, "evaluation")
        for name, content in files.items():
            write_file(f"{folder}/{name}", content)
        evaluated = Evaluated(
            uri=folder,
            name=inputs.key,
            adapter=finetuned.uri,
            index_name=inputs.store.name,
            index_version=version,
            run_id=run_id,
            num_prompts=len(results.prompts),
            metrics=results.flat(),
            is_new=True,
            duration_s=time.perf_counter() - started,
        )
        write_json(f"{folder}/{RESULTS}", {"evaluated": asdict(evaluated), "results": results.to_json()})
    return evaluated


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Everything that the results of an evaluation depend on."""

    finetuned: Finetuned
    training_set: TrainingSet
    config: EvaluateConfig
    metric: GateMetricName
    prompts: Prompts
    retriever: Retriever
    store: Store
    ways: list[Way]
    parent: str
    """Folder of all evaluations of the corpus."""

    @classmethod
    def of(
        cls,
        finetuned: Finetuned,
        config: EvaluateConfig,
        settings: Settings,
        champion: Deployed | None,
        metric: GateMetricName,
    ) -> "_Inputs":
        """Read what an evaluation needs. Raises UserError, see `evaluate`."""
        training_set = training_set_of(finetuned)
        retriever = Retriever(settings.index_uri, finetuned.index_name)
        # Raises UserError if the index has no features of this base model.
        retriever.count_without(identity_of(resolve(finetuned.base), retriever.dataset.schema))
        store = Store(retriever.uri, retriever.name)
        index = store.index_version(retriever.version)
        return cls(
            finetuned=finetuned,
            training_set=training_set,
            config=config,
            metric=metric,
            prompts=read_prompts(config, training_set),
            retriever=retriever,
            store=store,
            ways=ways_of(config, finetuned, training_set.teacher, index, champion),
            parent=f"{settings.training_of(finetuned.index_name)}/evaluations",
        )

    @cached_property
    def key(self) -> str:
        """Name of the evaluation, a digest of its inputs."""
        config, prompts = self.config, self.prompts
        inputs = {
            "version": [_VERSION, VERSION],
            "config": config.model_dump(exclude={"num_workers", "stall_timeout_s", "batch_size", "files"}),
            "files": digests_of(config.files),
            "prompts": [prompts.texts, prompts.categories],
            "ways": [way.key() | {"name": way.name} for way in self.ways],
            "index": self.store.index_version(self.retriever.version).key,
            "metric": self.metric,
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _measure(inputs: _Inputs, settings: Settings, on_progress: OnProgress) -> tuple[Results, list[Pictures]]:
    """Make the pictures of all ways and measure them; return the results, and the pictures of the columns."""
    config, prompts, retriever = inputs.config, inputs.prompts, inputs.retriever
    rows = real_rows(retriever, prompts.texts)
    index = Source(table=inputs.store, version=retriever.version, rows=rows.select(["id", "prompt"]), unused=("tifa",))
    job = PictureJob(prompts.texts, inputs.ways, config, inputs.parent)
    looks = FeatureJob({_INDEX: index, **{way.name: job.source(way) for way in inputs.ways}}, config, inputs.parent)
    real = Real(to_hex(rows["id"]), rows["number"].to_numpy(), cache(partial(looks.read, _INDEX)))
    # Before any picture is made, to fail early on invalid files.
    suite = Suite(config, prompts, real, retriever)
    check_networks(config.files)
    latencies = job.run(settings, on_progress)
    looks.run(settings, on_progress)
    measuring = _Measuring(job, looks, suite, real, prompts, on_progress)
    rows, points, pictures = measuring.measure(config, inputs.metric, latencies)
    metrics = suite.about
    results = Results(
        base=inputs.training_set.base,
        adapter=inputs.finetuned.uri,
        index=f"{retriever.name}, version {retriever.version}",
        machine=_machine(),
        prompts=prompts.texts,
        categories=prompts.categories,
        metrics=metrics,
        ways=tuple(replace(row, scores={name: row.scores[name] for name in metrics}) for row in rows),
        points=tuple(points),
        leakage=measure_leakage(retriever, prompts.texts, inputs.training_set),
        not_measured=suite.not_measured,
    )
    return results, pictures


@dataclass(frozen=True)
class _Stored:
    """The pictures of a way in the jobs' tables."""

    job: PictureJob
    looks: FeatureJob
    way: Way

    def __len__(self) -> int:
        return self.job.num_pictures

    def references(self) -> Sequence[tuple[Reference, ...]]:
        """Return the references of each picture (N,)."""
        return self.job.references(self.way)

    def features(self, network: NetworkName) -> Floats:
        """Return the features (N, D) of the pictures by a network."""
        return self.looks.read(self.way.name, network)

    def image(self, number: int) -> Image.Image:
        """Return a picture."""
        return self.job.image(self.way, number)


class _Measuring:
    """Measures the pictures of a job against one set of real pictures."""

    def __init__(
        self,
        job: PictureJob,
        looks: FeatureJob,
        suite: Suite,
        real: Real,
        prompts: Prompts,
        on_progress: OnProgress,
    ) -> None:
        self._job, self._looks, self._suite, self._real, self._on_progress = job, looks, suite, real, on_progress
        self._numbers = np.repeat(np.arange(len(prompts.texts)), job.images_per_prompt)
        self._texts = tuple(prompts.texts[number] for number in self._numbers)
        self._left_out = np.concatenate([real.places_of(job.references(way)) for way in job.ways], 1)
        self._threshold = threshold_of(real)

    def measure(
        self, config: EvaluateConfig, metric: GateMetricName, latencies: dict[str, Latency]
    ) -> tuple[list[WayResults], list[CurvePoint], list[Pictures]]:
        """Return the results of each column and each curve point, and the pictures of the columns."""
        rows: list[WayResults] = []
        columns: list[Pictures] = []
        points: list[CurvePoint] = []
        by_w: dict[float, tuple[Made, dict[MetricName, Score]]] = {}
        for number, way in enumerate(self._job.ways, 1):
            pictures = self._pictures(_Stored(self._job, self._looks, way))
            if way.is_column:
                rows.append(self._row(pictures, latencies[way.name]))
                columns.append(pictures)
            scores = dict(rows[-1].scores) if way.is_column else self._suite.measure(pictures, {metric, *JUDGES})
            copies = rows[-1].copies if way.is_column else measure_copies(pictures, self._threshold)
            if way.curve:
                judged = {name: scores[name].estimate for name in JUDGES if name in scores}
                points.append(CurvePoint(curve=way.curve, setting=way.setting, scores=judged, copies=copies))
            if way.curve == "slerp" and way.w in config.slerp_ws:
                by_w[way.w] = pictures.made, scores
            self._on_progress(number, len(self._job.ways), f"measured {way.title}")
        if metric in self._suite.about:
            best = self._pictures(self._best_slerp(by_w, metric))
            before = config.ways[: config.ways.index("best_slerp")]
            place = sum(row.name in before for row in rows)
            rows.insert(place, self._row(best, latencies["best_slerp"]))
            columns.insert(place, best)
        return rows, sorted(points, key=lambda point: (point.curve, point.setting)), columns

    def _best_slerp(self, by_w: dict[float, tuple[Made, dict[MetricName, Score]]], metric: GateMetricName) -> Made:
        values = {w: scores[metric].values for w, (_, scores) in sorted(by_w.items())}
        ws = choose_ws(values, larger_is_better=self._suite.about[metric].larger_is_better)
        return with_chosen_ws({w: made for w, (made, _) in by_w.items()}, ws, self._numbers)

    def _row(self, pictures: Pictures, latency: Latency) -> WayResults:
        way = pictures.made.way
        return WayResults(
            name=way.name,
            title=way.title,
            function_evaluations=way.steps,
            num_pictures=len(pictures.made),
            scores=self._suite.measure(pictures),
            latency=latency,
            retrieval=_retrieval(pictures.made, self._texts),
            copies=measure_copies(pictures, self._threshold),
        )

    def _pictures(self, made: Made) -> Pictures:
        return Pictures(made, self._numbers, self._real, self._left_out)


def _retrieval(made: Made, prompts: tuple[str, ...]) -> Retrieval | None:
    """Summarise the references of a way; None if it has none."""
    references = made.references()
    shown = [reference for own in references for reference in own]
    if not shown:
        return None
    hits = [
        any(reference.caption.strip() == prompt for reference in own)
        for own, prompt in zip(references, prompts, strict=True)
    ]
    return Retrieval(
        hit_rate=float(np.mean(hits)),
        similarity=float(np.mean([reference.similarity for reference in shown])),
        gated=float(np.mean([reference.weight == 0 for reference in shown])),
    )


def _machine() -> str:
    """Name the driver's machine. Latencies assume that the workers' machines are alike."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def _track(inputs: _Inputs, results: Results, files: Mapping[str, bytes], settings: Settings) -> str:
    """Log the metrics and files to MLflow, with a tag that names the training's run, and return the run's id."""
    finetuned, seed = inputs.finetuned, inputs.config.seed
    parameters = {"seed": seed, "prompts": len(results.prompts), "index": results.index, "base": results.base}
    tags = {"training_run": finetuned.run_id, "adapter": results.adapter}
    run_id = lasting_run(f"{inputs.parent}/runs/{inputs.key}.json", settings, EXPERIMENT, inputs.key, parameters, tags)
    with MlflowTracker(tracking_uri(settings), run_id) as tracker:
        tracker.metrics(results.flat(), 0)
        for name, content in files.items():
            tracker.file(name, content)
    return run_id
