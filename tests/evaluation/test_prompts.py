"""Which prompts pictures are made of."""

import dataclasses
import logging
from pathlib import Path

import lance
import pyarrow as pa
import pytest

from imagerag.artifacts import TrainingSet
from imagerag.evaluation.config import EvaluateConfig
from imagerag.evaluation.prompts import read_prompts
from imagerag.training.examples import read_lines


def training_set(references_uri: str = "") -> TrainingSet:
    """Return one of which nothing is read but its examples."""
    values = {field.name: "" for field in dataclasses.fields(TrainingSet)} | {"references_uri": references_uri}
    return TrainingSet(**values)  # type: ignore[arg-type]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa red mug\tcups\r\na dog\r\n")
    prompts = read_prompts(EvaluateConfig(prompts=str(path)), training_set())
    assert dict(zip(prompts.texts, prompts.categories, strict=True)) == {"a red mug": "cups", "a dog": ""}
    assert read_lines(str(path)) == ["a red mug\tcups", "a dog"]


def test_a_held_out_caption_that_is_too_long_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held_out = ["a red mug", "a dog " * 400, "a cat"]
    rows = pa.table({"prompt": [*held_out, "learnt from"], "is_held_out": [True, True, True, False]})
    lance.write_dataset(rows, tmp_path / "references.lance")
    with caplog.at_level(logging.WARNING):
        prompts = read_prompts(EvaluateConfig(), training_set(str(tmp_path / "references.lance")))
    assert set(prompts.texts) == {"a red mug", "a cat"}
    assert "1 of 3 held-out captions are skipped" in caplog.text
