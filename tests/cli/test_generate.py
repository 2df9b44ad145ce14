"""`imagerag generate`, with a base model of random weights in SD-Turbo's format."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from imagerag.cli import app
from imagerag.errors import UserError
from tests.generation.folders import write_sd


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("bases") / "sd-turbo")


def _generate(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_it_writes_every_picture_and_a_grid(base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lion/with a mane\n\n  two foxes  \n")
    output = _generate("a fox", "--prompt-file", prompts, "--base", base, "--seeds", 2, "--out", tmp_path / "out")
    assert "6 pictures in" in output
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [
        "0000-a-fox-seed0.png",
        "0001-a-fox-seed1.png",
        "0002-a-lion-with-a-mane-seed0.png",
        "0003-a-lion-with-a-mane-seed1.png",
        "0004-two-foxes-seed0.png",
        "0005-two-foxes-seed1.png",
        "grid.png",
    ]
    picture = Image.open(tmp_path / "out" / files[3])
    about = json.loads(picture.text["imagerag"])
    assert picture.size == (16, 16)
    assert (about["prompt"], about["seed"], about["steps"]) == ("a lion/with a mane", 1, 1)
    assert len(about["digest"]) == 64
    for name in (files[3], "grid.png"):
        assert b"digitalsourcetype/trainedAlgorithmicMedia" in Image.open(tmp_path / "out" / name).info["xmp"]


def test_the_same_seed_is_the_same_picture(base: Path, tmp_path: Path) -> None:
    _generate("a fox", "--base", base, "--seeds", 3, "--out", tmp_path / "one")
    _generate("a fox", "--base", base, "--seeds", 1, "--seed", 2, "--out", tmp_path / "other")
    one, other = (
        Image.open(tmp_path / name).convert("RGB")
        for name in ("one/0002-a-fox-seed2.png", "other/0000-a-fox-seed2.png")
    )
    assert max(high for _, high in _difference(one, other)) <= 1
    assert max(high for _, high in _difference(one, Image.open(tmp_path / "one/0000-a-fox-seed0.png"))) > 8


def _difference(one: Image.Image, other: Image.Image) -> tuple[tuple[int, int], ...]:
    from PIL import ImageChops

    extrema: tuple[tuple[int, int], ...] = ImageChops.difference(one, other).getextrema()
    return extrema


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give at least one prompt, or a --prompt-file"),
        (["a fox", " "], "a prompt is empty"),
        (["--prompt-file", "missing.txt"], "--prompt-file has to be a readable text file; missing.txt"),
        (["a fox", "--base", "stabilityai/sd-turbo"], "pinned by a full commit"),
        (["a fox", "--out", __file__], "--out is a folder"),
        (["a fox", "--name", "x", "--scale", "2"], "--scale is of what an adapter adds: name one by --adapter"),
    ],
)
def test_the_users_mistake_is_named_before_anything_is_loaded(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagerag.base.files.resolve", lambda _: pytest.fail("nothing may be loaded"))
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, ["generate", *arguments], catch_exceptions=False)
