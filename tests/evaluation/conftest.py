"""Adapters as a fine-tuning leaves them, that no training made."""

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path

import pytest
import torch

from imagerag.artifacts import Finetuned
from imagerag.generation.finetuned import ADAPTER, MANIFEST
from imagerag.training.tracking import start_run
from tests.generation.with_index import make_adapter
from tests.training.conftest import World, own_world, world_folder

__all__ = ["own_world", "world_folder"]


@pytest.fixture
def finetuned() -> Callable[..., Finetuned]:
    """Make another adapter with each call."""
    numbers = count()
    return lambda world, *, tracked=False: make_finetuned(world, next(numbers), tracked=tracked)


def make_finetuned(world: World, number: int, *, tracked: bool = False) -> Finetuned:
    training_set = world.synthesize()
    run_id = start_run(world.settings, "finetune", f"adapter{number}", {}) if tracked else "none"
    folder = Path(world.settings.training_of(training_set.index_name)) / "finetuned" / f"adapter{number}"
    adapter = make_adapter()
    torch.nn.init.normal_(adapter.to_out.weight, std=1.0 + number)
    adapter.save_pretrained(folder / ADAPTER)
    own = Finetuned(
        uri=str(folder), name=f"adapter{number}", base=training_set.base, base_digest=training_set.base_digest,
        index_name=training_set.index_name, index_version=training_set.index_version, run_id=run_id, num_steps=1,
        score=1.0, best_step=1, best_score=1.0, is_new=True,
    )  # fmt: skip
    manifest = {"finetuned": asdict(own), "training_set": asdict(training_set), "config": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return own
