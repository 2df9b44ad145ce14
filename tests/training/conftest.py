"""A small index with features of a base model of random weights, and what is learnt from it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from imagerag.artifacts import TrainingSet
from imagerag.base.files import resolve
from imagerag.base.model import load_base
from imagerag.hspace.cache import _choose, identity_of
from imagerag.hspace.encode import encode_references, open_images, to_cache
from imagerag.retrieval import feature_column
from imagerag.retrieval.schema import FeatureIdentity, Features, Fit
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training import synthesize
from imagerag.training.config import SynthesizeConfig
from imagerag.training.data import RagData
from imagerag.training.examples import Examples
from tests.generation.with_index import CAPTIONS, drawing, make_pipeline, sentences, write_store
from tests.retrieval.rows import append, fixed_size_lists, index_and_publish, make_rows

NAME = "images"
HELD_OUT = ("harp", "llama")
TWINS = ["castle", "castle"]


class World:
    """Where everything is."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(home=folder / "home")
        self.base = str(folder / "base")
        self.held_out = folder / "held_out.txt"

    @property
    def store(self) -> Store:
        return Store(self.settings.index_uri, NAME)

    @property
    def identity(self) -> FeatureIdentity:
        return identity_of(resolve(self.base), self.store.dataset().schema)

    def config(self, **changes: object) -> SynthesizeConfig:
        values = {"base": self.base, "teacher": self.base, "held_out": str(self.held_out), "num_inference_steps": 2}
        return SynthesizeConfig(**values | {"batch_size": 4} | changes)  # type: ignore[arg-type]

    def examples(self, **changes: object) -> Examples:
        retriever = Retriever(self.settings.index_uri, NAME)
        return Examples(retriever, self.config(**changes), self.settings.training_of(NAME))

    def add(self, start: int, captions: list[str], images: list[bytes]) -> None:
        """Append rows to the index, with features, and publish it."""
        embeds = fixed_size_lists(sentences(make_pipeline(), captions))
        rows = make_rows(
            start, start + len(captions), self.store.encoder, caption=captions, image=images,
            text_embed=embeds, image_embed=embeds,
        )  # fmt: skip
        append(self.store, rows)
        self.fill()
        index_and_publish(self.store)

    def fill(self, fit: Fit | None = None) -> None:
        """Give all rows features, by the fit that is given or the one that is there."""
        base, store = load_base(self.base, "cpu"), self.store
        identity, superseded = _choose(resolve(self.base), fit, store.dataset().schema)

        def compute(images: list[bytes], captions: list[str]) -> Features:
            pictures = open_images(images)
            return to_cache(encode_references(base.vae, base.unet, base.conditioner, pictures, captions, identity.fit))

        version = feature_column.prepare(store, identity, superseded)
        for fragment in feature_column.missing(store.dataset(version), identity):
            feature_column.commit(store, [feature_column.fill(store, identity, version, fragment, compute, 4)], version)

    def data(self, training_set: TrainingSet) -> RagData:
        """Open a training set."""
        return RagData(training_set, load_base(self.base, "cpu"))

    def synthesize(self, **changes: object) -> TrainingSet:
        """Make a training set in this process."""
        examples = self.examples(**changes)
        examples.check()
        added = 0
        for each in synthesize._lacking(examples):
            worker = each.worker(batch_size=4, device="cpu", dtype=None, **each.arguments)
            if each.rows.num_rows:
                fragments, num_rows = worker(each.rows)
                each.commit(fragments)
                added += num_rows
        return replace(synthesize.describe(examples), num_added=added)


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows, and two more castles: one with another picture, one with the first castle's."""
    folder = tmp_path_factory.mktemp("training")
    world = World(folder)
    pipeline = make_pipeline()
    pipeline.save_pretrained(world.base)
    world.held_out.write_text("\n".join(HELD_OUT))
    write_store(Path(world.settings.index_uri), pipeline)
    world.add(8, ["castle", "castle "], [drawing(20), drawing(CAPTIONS.index("castle"))])
    return folder


@pytest.fixture
def world(world_folder: Path) -> World:
    """A world that is only read."""
    return World(world_folder)


@pytest.fixture
def own_world(world_folder: Path, tmp_path: Path) -> World:
    """A world of this test's own."""
    shutil.copytree(world_folder, tmp_path / "world", ignore=shutil.ignore_patterns("training"))
    return World(tmp_path / "world")


@pytest.fixture(scope="session")
def training_set(world_folder: Path) -> TrainingSet:
    return World(world_folder).synthesize(num_teacher_latents=5)
