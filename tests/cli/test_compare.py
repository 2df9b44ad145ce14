"""`imagerag compare` and `imagerag generate --name`, with the shipped base model and a small index."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from imagerag.base.model import load_base
from imagerag.cli import app
from imagerag.cli.generate import open_pipeline
from imagerag.embedded import tiny_base
from imagerag.embedded.sample import load_drawings
from imagerag.embedding.encoder_files import resolve
from imagerag.errors import UserError
from imagerag.evaluation.compare import Comparer
from imagerag.evaluation.scorer import Scorer
from imagerag.hspace.adapter import HSpaceAdapter
from imagerag.hspace.encode import encode_references, feature_identity, open_images, to_cache
from imagerag.retrieval import feature_column
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, publish
from imagerag.retrieval.schema import Features
from imagerag.settings import Settings
from tests.retrieval.quality import Texts, write_index

NUM_ROWS = 120
SLERP = f"slerp, w = {tiny_base.SLERP_W}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a published index of some drawings, and their features."""
    home = tmp_path_factory.mktemp("home")
    drawings = load_drawings(styles=["noto", "twemoji"], splits=["held_out"])
    names = sorted({drawing.concept.name for drawing in drawings})[: NUM_ROWS // 2]
    chosen = [drawing for drawing in drawings if drawing.concept.name in names]
    store = write_index(home / "index", Texts(), resolve("tiny").identity, chosen)
    base = load_base("tiny", "cpu")
    identity = feature_identity(base.identity, base.unet.config, "auto")

    def compute(images: list[bytes], captions: list[str]) -> Features:
        pictures = open_images(images)
        return to_cache(encode_references(base.vae, base.unet, base.conditioner, pictures, captions, "auto"))

    version = feature_column.prepare(store, identity)
    for fragment in feature_column.missing(store.dataset(version), identity):
        feature_column.commit(store, [feature_column.fill(store, identity, version, fragment, compute, 32)], version)
    publish(store, build_index(store, IndexConfig()), PublishConfig())
    return home


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(home))


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_page_a_grid_and_numbers(tmp_path: Path) -> None:
    out = tmp_path / "compare"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a castle\na <b>camera</b>\n")
    output = run("compare", "--prompt-file", prompts, "--name", "sample", "--out", out)
    columns = ["base", SLERP, "oracle: best w", "teacher, 25 steps"]
    assert all(column in output for column in columns)

    scores = json.loads((out / "scores.json").read_text())
    assert [each["prompt"] for each in scores] == ["a castle", "a <b>camera</b>"]
    for each in scores:
        cells = {cell["title"]: cell for cell in each["cells"]}
        assert list(cells) == columns
        assert cells["oracle: best w"]["score"] >= cells[SLERP]["score"]
        assert cells["base"]["references"] == cells["teacher, 25 steps"]["references"] == []
    (reference,) = scores[0]["cells"][1]["references"]
    assert reference["caption"] == "castle"
    assert reference["weight"] == pytest.approx(1 - tiny_base.SLERP_W)

    page = (out / "index.html").read_text()
    assert page.count('<img class="made"') == 8
    assert "a &lt;b&gt;camera&lt;/b&gt;" in page
    assert "<b>camera" not in page
    assert not re.search(r'(?:src|href)="(?!data:image/|https://example\.org/)', page)
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 4 * 64


def test_nothing_that_slerp_can_do_is_better_than_the_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagerag.evaluation.compare.ORACLE_WS", (1.0,))  # so that the pipeline's own w is the better
    pipeline = open_pipeline("tiny", None).use_index(Settings().index_uri, "sample")
    pipeline.register_to_config(slerp_w=-0.15)
    assert pipeline.index is not None
    comparer = Comparer(pipeline, None, Scorer.of(pipeline.index.retriever, tmp_path / "scorer.npz"), seed=0)
    for comparison in comparer.compare(["a castle", "a red dragon"]):
        base, own, oracle = comparison.cells
        assert oracle.score == max(base.score, own.score)
        assert oracle.note == f"w = {1.0 if base.score > own.score else -0.15}, chosen by the score"


def test_generated_pictures_name_their_references(tmp_path: Path) -> None:
    run("generate", "a castle", "--name", "sample", "--seeds", 1, "--out", tmp_path / "rag")
    run("generate", "a castle", "--seeds", 1, "--out", tmp_path / "base")
    pictures = [Image.open(tmp_path / name / "0000-a-castle-seed0.png") for name in ("rag", "base")]
    about, plain = (json.loads(picture.text["imagerag"]) for picture in pictures)
    assert [row["caption"] for row in about["references"]] == ["castle"]
    assert plain["references"] == []
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_an_adapter_is_used_at_the_scale_that_is_asked_for(tmp_path: Path) -> None:
    adapter = HSpaceAdapter(192)
    torch.nn.init.constant_(adapter.to_gate.bias, 0.5)
    adapter.save_pretrained(tmp_path / "adapter")
    arguments = ("a castle", "--name", "sample", "--adapter", tmp_path / "adapter", "--seeds", 1)
    made = {}
    for scale in ("0", "1", "2", None):
        run("generate", *arguments, *([] if scale is None else ["--scale", scale]), "--out", tmp_path / str(scale))
        made[scale] = Image.open(tmp_path / str(scale) / "0000-a-castle-seed0.png")
    run("generate", "a castle", "--seeds", 1, "--out", tmp_path / "base")
    assert made["0"].tobytes() == Image.open(tmp_path / "base" / "0000-a-castle-seed0.png").tobytes()
    assert made[None].tobytes() == made["1"].tobytes() != made["2"].tobytes()
    assert json.loads(made["2"].text["imagerag"])["scale"] == 2
    output = run("compare", *arguments[:5], "--scale", "2", "--out", tmp_path / "compare")
    assert "adapter, scale = 2" in output


def test_references_need_an_index() -> None:
    for arguments in (("--fusion", "slerp"), ("--compose",)):
        with pytest.raises(UserError, match="name its corpus by --name"):
            run("generate", "a castle", *arguments)


def test_a_scale_needs_an_adapter_or_a_model_that_has_one() -> None:
    for command in ("generate", "compare"):
        with pytest.raises(UserError, match="name one by --adapter, or a model that has one by --model; got --scale 2"):
            run(command, "a castle", "--name", "sample", "--scale", 2)


def test_an_adapters_folder_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path} has none"):
        run("generate", "a castle", "--name", "sample", "--adapter", tmp_path)
