"""Every stage at a tiny size, as a driver runs it, and what has to hold of a home at any moment and in the end."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import lance
from PIL import Image

from imagerag.artifacts import Finetuned
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.download import download
from imagerag.corpus.source import read_images
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.embed import embed
from imagerag.evaluation.config import EvaluateConfig, MetricFiles
from imagerag.hspace.cache import cache_features
from imagerag.hspace.config import FeaturesConfig
from imagerag.registry.promotion import promote
from imagerag.registry.versions import list_versions, register
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.pins import pins
from imagerag.retrieval.publish import PublishConfig, publish, published_version, status
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.takedown import find, take_down
from imagerag.training.config import (
    FinetuneConfig,
    LossWeights,
    ReferenceChoice,
    SynthesizeConfig,
    TrainWorkersConfig,
)
from imagerag.training.finetune import finetune, newest_finetuned
from imagerag.training.synthesize import synthesize
from tests.corpus.whole import images_of

NAME = "images"
NUM_IMAGES = 24
OTHER_JOB = "job-another"


@dataclass(frozen=True)
class World:
    """What drivers are told: where the inputs are, and by the environment where everything else is."""

    inputs: Path
    """With `pictures`, and the models `base` and `clip`."""
    environment: dict[str, str]
    """Settings, and of the store, if there is one."""

    @property
    def settings(self) -> Settings:
        os.environ.update(self.environment)
        return Settings()

    @property
    def store(self) -> Store:
        return Store(self.settings.index_uri, NAME)

    @property
    def taken_down(self) -> str:
        return (self.inputs / "pictures" / "03.png").as_uri()

    def data(self) -> SynthesizeConfig:
        base = str(self.inputs / "base")
        return SynthesizeConfig(
            base=base, teacher=base, held_out_share=0.2, num_inference_steps=2, batch_size=4, num_teacher_latents=4
        )


def write_inputs(folder: Path) -> None:
    from tests.evaluation.networks import write_clip
    from tests.generation.folders import write_sd

    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for number in range(NUM_IMAGES):
        colour = (number * 10, 255 - number * 10, number * 37 % 256)
        Image.new("RGB", (40, 40), colour).save(pictures / f"{number:02d}.png")
        (pictures / f"{number:02d}.txt").write_text(f"picture number {number}")
    write_sd(folder / "base")
    write_clip(folder / "clip")


def _download(world: World) -> None:
    config = DownloadConfig(image_format="webp", shard_size=5)
    settings = world.settings
    images = read_images(str(world.inputs / "pictures"))
    download(images, corpus=Corpus(settings.shards_of(NAME)), config=config, settings=settings, mode="replace")


def _embed(world: World) -> None:
    settings = world.settings
    config = EmbedConfig(batch_size=4, commit_every_s=0, num_workers=1)
    embed(corpus=Corpus(settings.shards_of(NAME)), store=world.store, encoder="tiny", config=config, settings=settings)


def _publish(world: World) -> None:
    assert publish(world.store, build_index(world.store, IndexConfig()), PublishConfig()).published


def _features(world: World) -> None:
    config = FeaturesConfig(base=str(world.inputs / "base"), batch_size=4, commit_every_s=0, num_workers=1)
    cache_features(world.store, config, world.settings)
    _publish(world)


def _synthesize(world: World) -> None:
    synthesize(NAME, world.data(), world.settings)


def _train(world: World) -> None:
    training = FinetuneConfig(
        references=ReferenceChoice(number=2), losses=LossWeights(perceptual=0.0), steps=4, batch_size=4,
        micro_batch_size=4, adapter_inner_dim=64, lora_rank=2, checkpoint_every=1, num_validated=2,
    )  # fmt: skip
    settings = world.settings
    finetune(synthesize(NAME, world.data(), settings), training, TrainWorkersConfig(num_workers=1), settings)


def _evaluate(world: World) -> None:
    from imagerag.evaluation.evaluate import evaluate

    files = MetricFiles(clip=str(world.inputs / "clip"))
    config = EvaluateConfig(ways=("base", "best_slerp", "adapter"), num_prompts=3, files=files)
    evaluate(_finetuned(world), config, world.settings, metric="clip_score")


def _register(world: World) -> None:
    made = register(_finetuned(world), world.settings)
    promote(world.settings, made.version, reason="it is there", author="somebody")


def _finetuned(world: World) -> Finetuned:
    return newest_finetuned(world.settings, NAME)


def _take_down(world: World) -> None:
    settings = world.settings
    take_down(settings, NAME, find(settings, NAME, urls=[world.taken_down]))


STAGES: dict[str, Callable[[World], None]] = {
    "download": _download,
    "embed": _embed,
    "publish": _publish,
    "features": _features,
    "synthesize": _synthesize,
    "train": _train,
    "evaluate": _evaluate,
    "register": _register,
    "takedown": _take_down,
}
"""In their order; each needs what those before it made."""


def run(stage: str, world: World) -> None:
    """Run a stage, in a process of its own."""
    STAGES[stage](world)


def facts(world: World) -> dict[str, object]:
    """What a home holds, whatever way it came there: nothing lost, nothing twice."""
    settings = world.settings
    found: dict[str, object] = {}
    for uri in _tables(world):
        table = lance.dataset(uri)
        if "id" not in table.schema.names:
            continue
        ids = Counter(table.to_table(columns=["id"])["id"].to_pylist())
        assert set(ids.values()) <= {1}, f"{uri} has rows twice"
        found[uri.rsplit("/", 1)[1].split("-")[0]] = len(ids) if "/training/" in uri else sorted(ids)
    found["images"] = sorted(images_of(Corpus(settings.shards_of(NAME)))["url"].to_pylist())
    if world.store.exists and published_version(world.store) is not None:
        state = status(world.store)
        found["published"] = (state.num_rows, [each.num_rows for each in state.features])
    if (settings.home / "mlflow" / "mlflow.db").exists():
        versions = list_versions(settings)
        found["models"] = [each.aliases for each in versions]
    return found


def check_readable(world: World) -> None:
    """What has to hold at any moment: readers read what is published, and what another job reads is there."""
    if world.store.exists and published_version(world.store) is not None:
        rows = Retriever(world.store.uri, NAME).read(["id", "image"])
        assert rows.num_rows > 0
        for label, version in pins(world.store).items():
            assert world.store.has(version), f"the version of {label} is gone"


def check_left_over(world: World, stage: str) -> None:
    """What has to hold when a stage has ended well: nothing is left of those that were killed."""
    filesystem, root = fsspec.url_to_fs(world.settings.index_uri.rsplit("/", 1)[0])
    names = [path for path in filesystem.find(root) if path.endswith((".partial", ".unfinished"))]
    assert names == []
    locks = [path for path in filesystem.find(root) if path.endswith(".lock")]
    held = [path for path in locks if json.loads(filesystem.cat_file(path) or b"{}")]
    assert held == []
    if "://" in world.settings.index_uri:
        return  # there, files of no version are deleted when they are seven days old
    for uri in _tables(world):
        table = lance.dataset(uri)
        versions = [lance.dataset(uri, version=each["version"]) for each in table.versions()]
        known = {file.path for version in versions for part in version.get_fragments() for file in part.metadata.files}
        if stage == "embed" and "/index/" in uri:
            continue  # the next publication removes them
        there = {path.name for path in Path(uri, "data").glob("*.lance")}
        assert there <= known, f"{uri} has files of no version"


def _tables(world: World) -> Iterator[str]:
    settings = world.settings
    for folder in (settings.index_uri, settings.training_of(NAME), f"{settings.training_of(NAME)}/evaluations"):
        filesystem, root = fsspec.url_to_fs(folder)
        for path in sorted(filesystem.glob(f"{root}/*.lance")):
            yield filesystem.unstrip_protocol(path).removeprefix("file://")
