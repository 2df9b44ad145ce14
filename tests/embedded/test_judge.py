"""The second judge's network: what it knows, and the recipe that made it."""

import json
from dataclasses import asdict, fields

import numpy as np
import torch

from imagerag.embedded.judge import FOLDER, MANIFEST_NAME, WEIGHTS_NAME, load_contrastive_network
from imagerag.embedded.sample import load_drawings
from imagerag.recipes.judge import SPLITS, Recipe, batch, contrastive_loss, recognised, train
from imagerag.storage.digests import sha256_of

STYLES = ("noto", "twemoji")
MANIFEST = json.loads((FOLDER / MANIFEST_NAME).read_text())


def test_the_shipped_weights_are_those_of_the_recipe() -> None:
    assert sha256_of(FOLDER / WEIGHTS_NAME) == MANIFEST["weights_sha256"]
    assert MANIFEST["recipe"] == asdict(Recipe())
    assert {field.name for field in fields(Recipe)} == MANIFEST["recipe"].keys()
    assert "held_out" not in (*SPLITS, *MANIFEST["splits"])


def test_it_recognises_held_out_drawings_by_the_other_style() -> None:
    """Measured in all styles: 0.55; chance is 0.01."""
    found = recognised(load_contrastive_network(), load_drawings(STYLES, ["held_out"]), "held_out")
    assert found["mean"] > 0.25


def test_the_same_recipe_makes_the_same_network() -> None:
    drawings = [drawing for drawing in load_drawings(STYLES, ["adapter"]) if drawing.concept.codepoint < "1f34"]
    recipe = Recipe(steps=2, batch_size=8, warmup_steps=1)
    one, other = (train(recipe, drawings).state_dict() for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_batch_has_each_concept_twice_and_the_loss_wants_its_pairs_near() -> None:
    concepts = [torch.full((2, 3, 64, 64), 20 * number, dtype=torch.uint8) for number in range(8)]
    pictures = batch(Recipe(batch_size=8, degrees=0, scale=0, shift=0, jitter=0), concepts, 0)
    assert pictures.shape == (2, 8, 3, 64, 64)
    assert torch.allclose(pictures[0], pictures[1], atol=1e-3), "the order of concepts is the same"
    values = torch.from_numpy(np.eye(8, dtype=np.float32))
    right = contrastive_loss(torch.stack([values, values]), 0.1)
    wrong = contrastive_loss(torch.stack([values, values.roll(1, 0)]), 0.1)
    assert right < 0.1 < wrong
