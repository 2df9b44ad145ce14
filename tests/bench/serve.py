"""A registered model: how long until its first picture, and what pyfunc and HTTP add to the bare pipeline."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch

from imagerag.artifacts import Finetuned
from imagerag.base.model import load_base
from imagerag.embedded.sample import load_drawings
from imagerag.embedding.encoder import load_encoder
from imagerag.generation.batch import generate
from imagerag.generation.finetuned import ADAPTER
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.hspace.cache import cache_features
from imagerag.hspace.config import FeaturesConfig
from imagerag.hspace.encode import feature_identity
from imagerag.registry import package
from imagerag.registry.fetch import download, pull
from imagerag.registry.model import PACKAGE
from imagerag.registry.promotion import promote
from imagerag.registry.serving import ImageRAGTurboModel
from imagerag.registry.versions import register
from imagerag.registry.waiting import Waiting
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training.tracking import start_run, tracking_uri
from tests.bench.generate import NUM_REFERENCES, make_index, sd21
from tests.bench.harness import Row, Scale, alternate, in_fresh_process, median
from tests.retrieval.rows import append, fixed_size_lists, index_and_publish, make_rows

BAR = 1.05
NAME = "images"
PROMPT = "a slice of watermelon"
NUM_ROWS = 400
REQUESTS: dict[Scale, int] = {"small": 10, "full": 60}
REPETITIONS: dict[Scale, int] = {"small": 1, "full": 3}
BATCHES = (4, 16)
CLIENTS = 16
_START_S = 120.0


def run(scale: Scale, folder: Path) -> list[Row]:
    """Measure cold, then warm, then at SD 2.1's shape, then in batches."""
    settings = Settings(home=folder / "home")
    in_fresh_process(_register, settings.home)
    return [
        *_cold(scale, settings, folder),
        *_warm(scale, settings, folder),
        *_sd(scale, folder),
        *_batches(settings, folder),
        _clients(folder),
    ]


def _register(home: Path) -> None:
    """Make a champion of `tiny`, whose adapter is random."""
    settings = Settings(home=home)
    store, encoder = Store(settings.index_uri, NAME), load_encoder("tiny", "cpu")
    store.open_or_create(encoder.identity)
    drawings = load_drawings()[:: len(load_drawings()) // NUM_ROWS][:NUM_ROWS]
    captions = [drawing.concept.name for drawing in drawings]
    embeds = fixed_size_lists(encoder.encode_texts(captions))
    rows = make_rows(
        0, len(drawings), encoder.identity, caption=captions, image=[drawing.image for drawing in drawings],
        text_embed=embeds, image_embed=embeds,
    )  # fmt: skip
    append(store, rows)
    cache_features(store, FeaturesConfig(), settings)
    version = index_and_publish(store).version
    base = load_base("tiny", "cpu")
    adapter = HSpaceAdapter(channels=feature_identity(base.identity, base.unet.config, "auto").shape[0])
    torch.nn.init.normal_(adapter.to_out.weight, std=0.02)
    adapter.save_pretrained(home / "adapter" / ADAPTER)
    run_id = start_run(settings, "finetune", "bench", {})
    made = Finetuned(
        uri=str(home / "adapter"), name="bench", base="tiny", base_digest=base.identity.digest, index_name=NAME,
        index_version=version or 0, run_id=run_id, num_steps=1, score=0.0, best_step=1, best_score=0.0, is_new=True,
    )  # fmt: skip
    promote(settings, register(made, settings).version, reason="the only one", author="bench")


def _cold(scale: Scale, settings: Settings, folder: Path) -> list[Row]:
    number = iter(range(1_000))

    def pulled() -> float:
        return in_fresh_process(_time_pull, settings.home, folder / f"pulled{next(number)}")[0]

    ours, peer = alternate(REPETITIONS[scale], pulled, lambda: in_fresh_process(_time_base)[0])
    return [
        Row(
            what="`tiny`: from `imagerag pull` to the first picture, in a new process",
            unit="s",
            ours=median(ours),
            peer=median(peer),
            peer_name="the base model alone, loaded to its first picture",
        )
    ]


def _time_pull(home: Path, out: Path) -> float:
    from imagerag.generation.pipeline import ImageRAGTurboPipeline

    started = time.perf_counter()
    pull(Settings(home=home), "champion", out)
    ImageRAGTurboPipeline.from_pretrained(out)(PROMPT)
    return time.perf_counter() - started


def _time_base() -> float:
    from imagerag.generation.pipeline import ImageRAGTurboPipeline

    started = time.perf_counter()
    ImageRAGTurboPipeline.from_base(load_base("tiny", "cpu"))(PROMPT)
    return time.perf_counter() - started


def _warm(scale: Scale, settings: Settings, folder: Path) -> Iterator[Row]:
    """One picture at a time of `tiny`, the three ways in turn."""
    loaded = package.load(download(settings, 1, folder / "model"))
    model = _model_of(loaded)
    with _served(settings) as url:

        def request(seed: int) -> None:
            body = {"dataframe_records": [{"prompt": PROMPT}], "params": {"seed": seed}}
            asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked) as answer:
                assert len(json.load(answer)["predictions"]) == 1

        ways: list[Callable[[int], object]] = [
            lambda seed: loaded(PROMPT, generator=torch.Generator().manual_seed(seed)),
            partial(_predict, model),
            request,
        ]
        for way in ways:
            way(0)
        bare, pyfunc, http = alternate(REQUESTS[scale], *(partial(_seconds, way) for way in ways))
    for name, own in (("pyfunc", pyfunc), ("HTTP", http)):
        for quantile in (50, 95):
            yield Row(
                what=f"`tiny`, one picture by {name}: p{quantile}",
                unit="ms",
                ours=1000 * float(np.percentile(own, quantile)),
                peer=1000 * float(np.percentile(bare, quantile)),
                peer_name=f"the bare pipeline: p{quantile}",
            )


def _sd(scale: Scale, folder: Path) -> list[Row]:
    pipeline = sd21()
    store = make_index(folder / "sd", 256, feature_identity(_identity(pipeline), pipeline.unet.config, "auto"))
    pipeline.use_index(store.uri, store.name)
    model = _model_of(pipeline)
    ways: list[Callable[[int], object]] = [
        lambda seed: pipeline(PROMPT, num_references=NUM_REFERENCES, generator=torch.Generator().manual_seed(seed)),
        partial(_predict, model),
    ]
    for way in ways:
        way(0)
    bare, ours = alternate(REPETITIONS[scale], *(partial(_seconds, way) for way in ways))
    return [
        Row(
            what="one picture at 512² by pyfunc, UNet and text encoder of SD 2.1's size, random weights, fp32",
            unit="s",
            ours=median(ours),
            peer=median(bare),
            peer_name="the bare pipeline",
            at_most=BAR,
        )
    ]


def _batches(settings: Settings, folder: Path) -> Iterator[Row]:
    loaded = package.load(folder / "model" / "artifacts" / "package")
    seeds = range(max(BATCHES))

    def rate(batch_size: int) -> float:
        started = time.perf_counter()
        list(generate(loaded, [PROMPT], seeds, batch_size=batch_size))
        return len(seeds) / (time.perf_counter() - started)

    rates = alternate(3, *(partial(rate, size) for size in (1, *BATCHES)))
    for size, own in zip(BATCHES, rates[1:], strict=True):
        yield Row(
            what=f"`tiny` with {NUM_REFERENCES} references, {size} pictures at a time",
            unit="pictures/s",
            ours=median(own),
            peer=median(rates[0]),
            peer_name="one at a time",
        )


def _clients(folder: Path) -> Row:
    """Requests for one picture each, by several clients at a time, each with a prompt of its own."""
    artifacts = {PACKAGE: str(folder / "model" / "artifacts" / "package")}

    def loaded(batch_size: int) -> ImageRAGTurboModel:
        model = ImageRAGTurboModel()
        model.load_context(SimpleNamespace(artifacts=artifacts, model_config={"batch_size": batch_size}))
        return model

    def rate(model: ImageRAGTurboModel) -> float:
        with ThreadPoolExecutor(CLIENTS) as clients:
            started = time.perf_counter()
            list(clients.map(lambda seed: _predict(model, seed, f"{PROMPT} {seed % CLIENTS}"), range(8 * CLIENTS)))
            return 8 * CLIENTS / (time.perf_counter() - started)

    together, alone = alternate(3, *(partial(rate, loaded(size)) for size in (CLIENTS, 1)))
    return Row(
        what=f"`tiny` with {NUM_REFERENCES} references, {CLIENTS} clients of pyfunc, `batch_size` {CLIENTS}",
        unit="pictures/s",
        ours=median(together),
        peer=median(alone),
        peer_name="one picture at a time",
        at_least=3.0,
    )


def _identity(pipeline: Any) -> Any:
    from imagerag.base.files import BaseIdentity

    return BaseIdentity(id=pipeline.config.base_id, digest=pipeline.config.base_digest)


def _model_of(pipeline: Any) -> ImageRAGTurboModel:
    """What MLflow calls, around a pipeline that is loaded already."""
    pipeline.set_progress_bar_config(disable=True)
    model = ImageRAGTurboModel()
    model._waiting = Waiting(pipeline)
    return model


def _predict(model: ImageRAGTurboModel, seed: int, prompt: str = PROMPT) -> object:
    return model.predict(None, pd.DataFrame({"prompt": [prompt]}), {"seed": seed, "num_references": NUM_REFERENCES})


def _seconds(way: Callable[[int], object]) -> float:
    started = time.perf_counter()
    way(1)
    return time.perf_counter() - started


@contextmanager
def _served(settings: Settings) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model-uri", "models:/imagerag-turbo@champion", "--workers", "1"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(settings), "PATH": _path()}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(f"http://127.0.0.1:{port}/ping")
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.kill()
        server.wait()


def _path() -> str:
    """MLflow starts uvicorn by its name."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _await(url: str) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
