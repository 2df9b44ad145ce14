"""An evaluation: pictures in every way, what is measured of them, and one table that says it."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np

from imagerag.artifacts import Evaluated, Finetuned, TrainingSet
from imagerag.evaluation.config import EvaluateConfig
from imagerag.evaluation.copies import measure_copies, measure_leakage, threshold_of
from imagerag.evaluation.metrics import Pictures, Real
from imagerag.evaluation.page import to_files
from imagerag.evaluation.pictures import VERSION, IndexVersion, Made, PictureJob
from imagerag.evaluation.prompts import Prompts, read_prompts
from imagerag.evaluation.results import RESULTS, Latency, Results, Retrieval, WayResults
from imagerag.evaluation.suite import Suite
from imagerag.evaluation.ways import Way, ways_of
from imagerag.evaluation.weights import digests_of
from imagerag.files import read_json, write_file, write_json
from imagerag.generation.spec import resolve
from imagerag.hspace.job import identity_of
from imagerag.locks import writer_lock
from imagerag.progress import OnProgress, silent
from imagerag.retrieval.pins import JOB, held
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training.job import training_set_of
from imagerag.training.tracking import MlflowTracker, lasting_run, tracking_uri

EXPERIMENT = "evaluate"
_VERSION = 2
"""Of what is measured, beside that of the pictures: another one measures again."""


def evaluate(
    finetuned: Finetuned,
    config: EvaluateConfig,
    settings: Settings,
    on_progress: OnProgress = silent,
    *,
    champion: str | None = None,
) -> Evaluated:
    """Compare an adapter with its base model, the teacher and the present champion, on the published index.

    Pictures that were made before are not made again, and an evaluation that was finished is returned at once.

    Args:
        finetuned: the candidate.
        config: what is generated and measured.
        settings: where everything is.
        on_progress: is told of pictures, then of measured ways.
        champion: the folder of the present champion, if there is one.

    Raises:
        UserError: if the training, its index, prompts or files of a metric are not there or not what they should be.
        StalledError: if the workers hang. Calling again goes on where they stopped.
    """
    started = time.perf_counter()
    training_set = training_set_of(finetuned)
    retriever = Retriever(settings.index_uri, finetuned.index_name)
    # Refuses an index without features.
    retriever.count_without(identity_of(resolve(finetuned.base), retriever.dataset.schema))
    prompts = read_prompts(config, training_set)
    ways = ways_of(config, finetuned, training_set.teacher, champion)
    index = IndexVersion.of(retriever)
    parent = f"{settings.training_of(finetuned.index_name)}/evaluations"
    key = _key(config, prompts, ways, index)
    folder = f"{parent}/{key}"
    store = Store(retriever.uri, retriever.name)
    with writer_lock(parent, key), held(store, retriever.version, f"{JOB}evaluation-{key}"):
        if (known := read_json(f"{folder}/{RESULTS}")) is not None:
            done = Evaluated(**known["evaluated"])
            seconds = time.perf_counter() - started
            return replace(done, uri=folder, adapter=finetuned.uri, is_new=False, duration_s=seconds)
        real = Real.of(retriever, prompts.texts)
        # Before any picture is made, because it refuses files that are not what they should be.
        suite = Suite(config, prompts, real, retriever)
        job = PictureJob(prompts.texts, ways, index, config, parent)
        latencies = job.run(settings, on_progress)
        results, pictures = _measure(job, suite, real, prompts, retriever, training_set, latencies, on_progress)
        files = to_files(results, pictures, retriever)
        run_id = _track(f"{parent}/runs/{key}.json", key, finetuned, config, results, files, settings)
        for name, content in files.items():
            write_file(f"{folder}/{name}", content)
        evaluated = Evaluated(
            uri=folder,
            name=key,
            adapter=finetuned.uri,
            index_name=retriever.name,
            index_version=retriever.version,
            run_id=run_id,
            num_prompts=len(prompts.texts),
            metrics=results.flat(),
            is_new=True,
            duration_s=time.perf_counter() - started,
        )
        write_json(f"{folder}/{RESULTS}", {"evaluated": asdict(evaluated), "results": results.to_json()})
    return evaluated


def _key(config: EvaluateConfig, prompts: Prompts, ways: list[Way], index: IndexVersion) -> str:
    inputs = {
        "version": [_VERSION, VERSION],
        "config": config.model_dump(exclude={"num_workers", "stall_timeout_s", "batch_size", "files"}),
        "files": digests_of(config.files),
        "prompts": [prompts.texts, prompts.categories],
        "ways": [way.key(index.key) | {"name": way.name} for way in ways],
        "index": index.key,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _measure(
    job: PictureJob,
    suite: Suite,
    real: Real,
    prompts: Prompts,
    retriever: Retriever,
    training_set: TrainingSet,
    latencies: dict[str, Latency],
    on_progress: OnProgress,
) -> tuple[Results, list[Pictures]]:
    numbers = np.repeat(np.arange(len(prompts.texts)), job.images_per_prompt)
    texts = tuple(prompts.texts[number] for number in numbers)
    threshold = threshold_of(real)
    rows, pictures = [], []
    for made in job.read():
        pictures.append(Pictures(made, texts, numbers, real))
        rows.append(
            WayResults(
                name=made.way.name,
                title=made.way.title,
                function_evaluations=made.way.steps,
                num_pictures=len(made.images),
                scores=suite.measure(pictures[-1]),
                latency=latencies[made.way.name],
                retrieval=_retrieval(made, texts),
                copies=measure_copies(pictures[-1], threshold),
            )
        )
        on_progress(len(rows), len(job.ways), f"measured {made.way.title}")
    metrics = suite.about
    results = Results(
        base=training_set.base,
        adapter=next(way.adapter or "" for way in job.ways if way.name == "adapter"),
        index=f"{retriever.name}, version {retriever.version}",
        machine=_machine(),
        prompts=prompts.texts,
        categories=prompts.categories,
        metrics=metrics,
        ways=tuple(replace(row, scores={name: row.scores[name] for name in metrics}) for row in rows),
        leakage=measure_leakage(retriever, prompts.texts, training_set),
        not_measured=suite.not_measured,
    )
    return results, pictures


def _retrieval(made: Made, prompts: tuple[str, ...]) -> Retrieval | None:
    """Return what a way was shown, if it was shown anything."""
    shown = [reference for own in made.references for reference in own]
    if not shown:
        return None
    hits = [
        any(reference.caption.strip() == prompt for reference in own)
        for own, prompt in zip(made.references, prompts, strict=True)
    ]
    return Retrieval(
        hit_rate=float(np.mean(hits)),
        similarity=float(np.mean([reference.similarity for reference in shown])),
        gated=float(np.mean([reference.weight == 0 for reference in shown])),
    )


def _machine() -> str:
    """Name the driver's machine; the workers' are alike, or their times say nothing."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def _track(
    path: str,
    key: str,
    finetuned: Finetuned,
    config: EvaluateConfig,
    results: Results,
    files: Mapping[str, bytes],
    settings: Settings,
) -> str:
    """Keep the numbers in MLflow, beside the training that they are about, and return the run."""
    parameters = {"seed": config.seed, "prompts": len(results.prompts), "index": results.index, "base": results.base}
    tags = {"training_run": finetuned.run_id, "adapter": results.adapter}
    run_id = lasting_run(path, settings, EXPERIMENT, key, parameters, tags)
    with MlflowTracker(tracking_uri(settings), run_id) as tracker:
        tracker.metrics(results.flat(), 0)
        for name, content in files.items():
            tracker.file(name, content)
    return run_id
