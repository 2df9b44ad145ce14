"""Fine-tuning `tiny` through Ray Train, beside the same steps in a bare loop that has its batches in memory."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from imagerag.artifacts import TrainingSet
from imagerag.base.model import load_base
from imagerag.embedded.sample import load_drawings
from imagerag.embedding.encoder import load_encoder
from imagerag.hspace.cache import cache_features
from imagerag.hspace.config import FeaturesConfig
from imagerag.hspace.split import EncoderOutput, encode
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training.config import FinetuneConfig, SynthesizeConfig, TrainWorkersConfig, tiny
from imagerag.training.data import RagData
from imagerag.training.finetune import finetune
from imagerag.training.loader import Loaded, Loader
from imagerag.training.perceptual import load_perceptual
from imagerag.training.synthesize import synthesize
from imagerag.training.trainer import Finetuning
from tests.bench.harness import Row, Scale, alternate, in_fresh_process, median
from tests.retrieval.rows import append, fixed_size_lists, index_and_publish, make_rows

BAR = 0.95
BAR_DATA = 0.05
NAME = "bench"
NUM_ROWS: dict[Scale, int] = {"small": 400, "full": 1_000}
STEPS: dict[Scale, int] = {"small": 12, "full": 60}
WARM_UP = 4
"""Steps that are not timed."""
REPETITIONS: dict[Scale, int] = {"small": 1, "full": 3}
IDLE_ACTORS = 8
"""About as many processes as Ray Train has beside the worker."""
_CPU = torch.device("cpu")
_CORES = min(os.cpu_count() or 1, 8)  # one worker has no more threads


def run(scale: Scale, folder: Path) -> list[Row]:
    """Train the same steps in either way, in turn."""
    settings = Settings(home=folder)
    made, _ = in_fresh_process(_make_set, folder, NUM_ROWS[scale])
    training_set = TrainingSet(**made)
    config = tiny().training.model_copy(update={"steps": STEPS[scale], "adversarial_share": 1.0, "num_validated": 8})
    config = config.model_copy(update={"checkpoint_every": STEPS[scale]})
    number = iter(range(1_000))
    waits: list[float] = []

    def ours(num_cores: int) -> float:
        # Another seed is another training.
        own = config.model_copy(update={"seed": next(number)})
        (step_s, data_s), _ = in_fresh_process(_time_job, settings.home, training_set, own, num_cores)
        waits.append(data_s)
        return step_s

    def loop(num_cores: int) -> float:
        return in_fresh_process(_time_loop, training_set, config, num_cores)[0]

    def loop_beside_ray() -> float:
        return in_fresh_process(_time_loop_beside_ray, settings.home, training_set, config, _CORES)[0]

    one_free = max(1, _CORES - 1)
    jobs, loops, loops_beside_ray, jobs_one_free, loops_one_free = alternate(
        REPETITIONS[scale],
        partial(ours, _CORES),
        partial(loop, _CORES),
        loop_beside_ray,
        partial(ours, one_free),
        partial(loop, one_free),
    )
    rate = config.batch_size / median(jobs)
    (kept, kept_by_all), _ = in_fresh_process(_kept, training_set, config)
    return [
        Row(
            what=f"`tiny`, batches of {config.batch_size}, all losses, one worker",
            unit="rows/s",
            ours=rate,
            peer=config.batch_size / median(loops),
            peer_name="the same steps in a loop, batches in memory",
            at_least=BAR,
        ),
        Row(
            what="the same",
            unit="rows/s",
            ours=rate,
            peer=config.batch_size / median(loops_beside_ray),
            peer_name=f"the loop on a machine with an idle Ray of {IDLE_ACTORS} actors",
        ),
        Row(
            what="the same, both with a thread less than there are cores",
            unit="rows/s",
            ours=config.batch_size / median(jobs_one_free),
            peer=config.batch_size / median(loops_one_free),
            peer_name="the loop, likewise",
            at_least=BAR,
        ),
        Row(
            what="time that a step waits for its data",
            unit="ms",
            ours=1000 * median(waits),
            peer=1000 * median(jobs),
            peer_name="the whole step",
            at_most=BAR_DATA,
        ),
        Row(
            what=f"kept of {config.micro_batch_size} rows for the generator's backward pass",
            unit="MiB",
            ours=kept / 2**20,
            peer=kept_by_all / 2**20,
            peer_name="with the encoder's activations",
        ),
    ]


def _make_set(folder: Path, num_rows: int) -> dict[str, object]:
    settings = Settings(home=folder)
    store, encoder = Store(settings.index_uri, NAME), load_encoder("tiny", "cpu")
    store.open_or_create(encoder.identity)
    drawings = load_drawings()[:: max(1, len(load_drawings()) // num_rows)][:num_rows]
    captions = [drawing.concept.name for drawing in drawings]
    embeds = fixed_size_lists(encoder.encode_texts(captions))
    images = [drawing.image for drawing in drawings]
    rows = make_rows(
        0, len(drawings), encoder.identity, caption=captions, image=images, text_embed=embeds, image_embed=embeds
    )
    append(store, rows)
    cache_features(store, FeaturesConfig(), settings)
    index_and_publish(store)
    return asdict(synthesize(NAME, SynthesizeConfig(held_out_share=0.1), settings))


def _time_job(folder: Path, training_set: TrainingSet, config: FinetuneConfig, num_cores: int) -> tuple[float, float]:
    """Seconds of a step, from one report of the worker to another, and what of them it waited for data."""
    os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": num_cores})
    from mlflow import MlflowClient

    from imagerag.training.tracking import tracking_uri

    settings = Settings(home=folder)
    made = finetune(training_set, config, TrainWorkersConfig(num_workers=1), settings)
    client = MlflowClient(tracking_uri(settings))
    reports = [each for each in client.get_metric_history(made.run_id, "data_s") if each.step >= WARM_UP]
    first, last = reports[0], reports[-1]
    step_s = (last.timestamp - first.timestamp) / 1000 / (last.step - first.step)
    return step_s, float(np.mean([each.value for each in reports]))


def _time_loop(training_set: TrainingSet, config: FinetuneConfig, num_threads: int) -> float:
    """Seconds of a step."""
    torch.set_num_threads(num_threads)
    training, batches = _prepare(training_set, config)
    started = 0.0
    for step, loads in enumerate(batches):
        if step == WARM_UP:
            started = time.perf_counter()
        training.step(loads)
    return (time.perf_counter() - started) / (len(batches) - WARM_UP)


def _time_loop_beside_ray(folder: Path, training_set: TrainingSet, config: FinetuneConfig, num_threads: int) -> float:
    """Seconds of a step while Ray's processes wake up for nothing, on the cores that the step computes with."""
    from imagerag.compute import start_ray

    class Idle:
        def ready(self) -> None:
            pass

    start_ray(Settings(home=folder))  # which sets what Ray reads when it is imported
    import ray

    actors = [ray.remote(num_cpus=0)(Idle).remote() for _ in range(IDLE_ACTORS)]
    ray.get([actor.ready.remote() for actor in actors])
    return _time_loop(training_set, config, num_threads)


def _prepare(training_set: TrainingSet, config: FinetuneConfig) -> tuple[Finetuning, list[list[partial[Loaded]]]]:
    base = load_base("tiny", "cpu")
    data = RagData(training_set, base)
    steps = [[load() for load in loads] for loads in Loader(data, config, _CPU).steps(0)]
    batches = [[partial(lambda loaded: loaded, loaded) for loaded in loads] for loads in steps]
    teacher = load_base("tiny-teacher", "cpu").unet
    return Finetuning(base, teacher, load_perceptual("tiny", _CPU), config), batches


def _kept(training_set: TrainingSet, config: FinetuneConfig) -> tuple[int, int]:
    """Bytes that are kept for the backward pass, as it is and with a graph through the encoder."""
    training, batches = _prepare(training_set, config.model_copy(update={"steps": 1}))
    batch = batches[0][0]().batch
    generator = training.generator

    def with_graph() -> tuple[torch.Tensor, EncoderOutput]:
        last = torch.full((len(batch.noise),), generator.diffusion.last)
        return generator(batch), encode(generator.unet, batch.noise.clone().requires_grad_(), last, batch.text)

    return _saved(lambda: generator(batch)), _saved(with_graph)


def _saved(forward: Callable[[], object]) -> int:
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(seen.values())
