"""`imagerag models`, `promote`, `rollback` and `pull`, and what a takedown says of models."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from imagerag.cli import app
from imagerag.errors import UserError
from imagerag.registry.versions import register, resolve_version
from imagerag.settings import Settings
from imagerag.storage.hexadecimal import to_hex
from tests.registry.conftest import Home


@pytest.fixture
def own(home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("IMAGERAG_HOME", str(home.settings.home))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LOGNAME", "ada")
    return home


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_models_are_promoted_and_rolled_back_by_name_and_with_a_reason(own: Home, tmp_path: Path) -> None:
    for name in ("first", "second"):
        register(own.finetuned(name), own.settings)
    assert "version 1 is the champion" in run("promote", 1, "--reason", "the first")
    run("promote", 2, "--reason", "sharper")
    assert resolve_version(own.settings, "champion").tags["imagerag.promoted_by"] == "ada"
    listed = run("models")
    for part in ("candidate, champion", "previous", "ada: sharper", "images"):
        assert part in listed, part
    assert "version 1 is the champion again" in run("rollback", "--reason", "too blue")
    assert CliRunner().invoke(app, ["promote", "2"]).exit_code == 2, "without a reason"
    with pytest.raises(UserError, match="not both"):
        run("pull", "--alias", "champion", "--version", "1", "--out", tmp_path / "pulled")
    assert f"version 2 is in {tmp_path / 'pulled'}, for the index" in run(
        "pull", "--version", 2, "--out", tmp_path / "pulled"
    )


def test_pictures_of_registered_models(own: Home, tmp_path: Path) -> None:
    for name in ("first", "second"):
        register(own.finetuned(name), own.settings)
    run("promote", 1, "--reason", "the first")
    made = {}
    for model in ("champion", "2"):
        run("generate", "a castle", "--model", model, "--seeds", 1, "--out", tmp_path / model)
        made[model] = Image.open(tmp_path / model / "0000-a-castle-seed0.png")
    abouts = {model: json.loads(picture.text["imagerag"]) for model, picture in made.items()}
    assert made["champion"].tobytes() != made["2"].tobytes()
    assert abouts["champion"]["model"] == "champion"
    assert abouts["2"]["references"][0]["caption"] == "castle"
    said = run("compare", "a castle", "--model", "champion", "--model", 2, "--out", tmp_path / "compare")
    assert "model champion" in said
    scores = json.loads((tmp_path / "compare" / "scores.json").read_text())
    titles = [cell["title"] for cell in scores[0]["cells"]]
    assert titles == ["base", "slerp, w = 0.8", "oracle: best w", "model champion", "model 2"]
    said = run("compare", "a castle", "--model", 2, "--scale", 0, "--out", tmp_path / "scaled")
    assert "model 2, scale = 0" in said
    cells = {cell["title"]: cell for cell in json.loads((tmp_path / "scaled" / "scores.json").read_text())[0]["cells"]}
    assert cells["model 2, scale = 0"]["score"] == cells["base"]["score"] != scores[0]["cells"][-1]["score"]
    assert {row["caption"]: row["weight"] for row in cells["model 2, scale = 0"]["references"]}["castle"] == 0
    mugs = Settings(home=own.settings.home, model_name="mugs")
    register(own.finetuned("second"), mugs)
    run("promote", 1, "--reason", "the only one", "--model-name", "mugs")
    assert "candidate, champion" in run("models", "--model-name", "mugs")
    run("generate", "a castle", "--model", "mugs@champion", "--seeds", 1, "--out", tmp_path / "mugs")
    assert Image.open(tmp_path / "mugs" / "0000-a-castle-seed0.png").tobytes() == made["2"].tobytes()
    with pytest.raises(UserError, match="mugs has no version or alias '7'"):
        run("generate", "a castle", "--model", "mugs/7")
    with pytest.raises(UserError, match="has its own base model, adapter and index: leave out --name, or --model 2"):
        run("generate", "a castle", "--model", "2", "--name", "images")
    with pytest.raises(UserError, match="no version or alias '7'"):
        run("generate", "a castle", "--model", "7")


def test_a_takedown_names_the_models_that_used_the_rows(own: Home) -> None:
    register(own.finetuned("first"), own.settings)
    register(own.finetuned("second"), own.settings, portable=True)
    ids = to_hex(own.store.ids())
    said = run("index", "remove", "--id", ids[0], "--yes")
    assert "imagerag-turbo-1-" in said
    assert "used removed rows and can no longer be loaded, unless it is portable: register it again on version " in said
    assert "deleted version 2 of imagerag-turbo, which was candidate, with its copy of the index" in said
    assert "imagerag-turbo-1" not in run("index", "remove", "--id", ids[1], "--yes")
