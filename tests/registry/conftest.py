"""A base model of random weights, an index with its features, and adapters as a fine-tuning leaves them."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL import Image

from imagerag.artifacts import Finetuned
from imagerag.base.model import load_base
from imagerag.generation.finetuned import ADAPTER, LORA, MANIFEST
from imagerag.hspace.encode import encode_references, feature_identity, open_images, to_cache
from imagerag.hspace.lora import LORA_NAME, save_lora
from imagerag.registry.promotion import promote
from imagerag.registry.versions import register
from imagerag.retrieval import feature_column
from imagerag.retrieval.schema import Features, Fit
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training.tracking import mlflow_client, start_run, tracking_uri
from tests.generation.with_index import make_adapter, make_pipeline, write_store
from tests.retrieval.rows import index_and_publish

NAME = "images"
LAYERS = r"up_blocks\..*\.(to_q|conv1|conv_shortcut)"


class Home:
    """Where everything is: a base model, an index, MLflow, and what was trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(home=folder / "home")
        self.base = folder / "base"

    @property
    def store(self) -> Store:
        return Store(self.settings.index_uri, NAME)

    @property
    def client(self) -> Any:
        return mlflow_client(tracking_uri(self.settings))

    def publish(self, fit: Fit = "auto") -> int:
        """Give all rows their features by one fit, and publish them."""
        base, store = load_base(str(self.base), "cpu"), self.store
        identity = feature_identity(base.identity, base.unet.config, fit)

        def compute(images: list[bytes], captions: list[str]) -> Features:
            pictures = open_images(images)
            return to_cache(encode_references(base.vae, base.unet, base.conditioner, pictures, captions, fit))

        superseded = [each for each in feature_column.cached_features(store.dataset().schema) if each != identity]
        version = feature_column.prepare(store, identity, superseded)
        for fragment in feature_column.missing(store.dataset(version), identity):
            feature_column.commit(store, [feature_column.fill(store, identity, version, fragment, compute, 4)], version)
        return index_and_publish(store).version or 0

    def finetuned(self, name: str) -> Finetuned:
        """What was trained under this name."""
        folder = self.folder / "finetuned" / name
        made = Finetuned(**json.loads((folder / MANIFEST).read_text())["finetuned"])
        return replace(made, uri=str(folder))

    def start_run(self, name: str) -> None:
        """Give a training a run of its own: MLflow's client remembers each run's folder, whatever its database."""
        made = replace(self.finetuned(name), run_id=start_run(self.settings, "finetune", name, {}))
        (Path(made.uri) / MANIFEST).write_text(json.dumps({"finetuned": asdict(made)}))

    def train(self, name: str, *, lora: bool = True) -> None:
        """An adapter and LoRA that no training made."""
        base, folder = load_base(str(self.base), "cpu"), self.folder / "finetuned" / name
        adapter = make_adapter()
        torch.nn.init.normal_(adapter.to_out.weight, std=0.5 + len(name) / 100)
        adapter.save_pretrained(folder / ADAPTER)
        if lora:
            base.unet.add_adapter(
                LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False), adapter_name=LORA_NAME
            )
            save_lora(base.unet, folder / LORA)
        made = Finetuned(
            uri=str(folder), name=name, base=str(self.base), base_digest=base.identity.digest, index_name=NAME,
            index_version=self.store.version, run_id="", num_steps=1,
            score=1.0, best_step=1, best_score=1.0, is_new=True,
        )  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps({"finetuned": asdict(made)}))
        self.start_run(name)


def copy_home(made: Path, folder: Path) -> Home:
    """Return a copy of a home; the base model is shared, because a folder is known by its path."""
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("base"), dirs_exist_ok=True)
    home = Home(folder)
    home.base = made / "base"
    for name in ("first", "second"):
        home.start_run(name)
    return home


@pytest.fixture(scope="session")
def made_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two trainings."""
    home = Home(tmp_path_factory.mktemp("registry"))
    make_pipeline().save_pretrained(home.base)
    write_store(Path(home.settings.index_uri), make_pipeline())
    home.publish()
    home.train("first")
    home.train("second", lora=False)
    return home.folder


@pytest.fixture
def home(made_home: Path, tmp_path: Path) -> Home:
    """A home of this test's own."""
    return copy_home(made_home, tmp_path)


@pytest.fixture(scope="session")
def champion(made_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with two versions, the first of them champion and the second portable. Nothing changes in it."""
    home = copy_home(made_home, tmp_path_factory.mktemp("champion"))
    grid = home.folder / "grid.png"
    Image.new("RGB", (8, 8)).save(grid)
    register(
        home.finetuned("first"),
        home.settings,
        results="| metric | value |",
        grid=grid,
        tags={"gate": "passed"},
        flow_run_url="http://prefect/run",
    )
    register(home.finetuned("first"), home.settings, portable=True)
    promote(home.settings, 1, reason="it is better", author="somebody")
    return home
