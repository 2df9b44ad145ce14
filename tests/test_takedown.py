"""A takedown, everywhere at once: no file under the home holds what was taken down."""

import json
import shutil
from base64 import b64encode
from collections.abc import Callable
from datetime import datetime, tzinfo
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner

from imagerag import takedown
from imagerag.artifacts import Finetuned, Sweep
from imagerag.cli import app
from imagerag.errors import UserError
from imagerag.evaluation.compare import Cell, Comparison
from imagerag.evaluation.compare_page import write_comparison
from imagerag.evaluation.feature_job import FEATURES
from imagerag.generation.references import Reference
from imagerag.plain import in_markdown
from imagerag.registry.promotion import promote
from imagerag.registry.versions import list_versions, register
from imagerag.retrieval.publish import PublishConfig
from imagerag.retrieval.search import Retriever
from imagerag.storage import lance_table
from imagerag.storage.hexadecimal import ID, from_hex, to_hex
from imagerag.storage.keyed_table import KeyedTable
from imagerag.storage.lance_table import LanceTable, rows_with
from imagerag.takedown_report import make_report
from imagerag.training.tracking import MlflowTracker, start_run, tracking_uri
from tests.embedding.shards import Sample, want, write_shard
from tests.evaluation.conftest import finetuned
from tests.generation.with_index import CAPTIONS, drawing
from tests.retrieval.rows import append, index_and_publish, make_rows
from tests.training.conftest import NAME, World, own_world, world_folder

__all__ = ["finetuned", "own_world", "world_folder"]

GONE = CAPTIONS.index("llama")
URL = f"https://example.org/{GONE}.png"


def files_with(folder: Path, *traces: bytes) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(trace in path.read_bytes() for trace in traces)]


def write_page(world: World, folder: Path, id: str) -> None:
    """A page that shows the row, as those of evaluations do."""
    shown = Reference(id=id, caption="llama", url=URL, source="", licence="", similarity=1.0, weight=1.0)
    cell = Cell(title="adapter", image=Image.new("RGB", (8, 8)), score=0.5, seconds=0.1, references=(shown,))
    retriever = Retriever(world.settings.index_uri, NAME)
    write_comparison(folder, [Comparison(prompt="a llama", cells=(cell,))], retriever, title="a page")


class Everything:
    """A home in which an image is everywhere."""

    def __init__(self, world: World, own: Finetuned) -> None:
        self.world, self.settings, self.own = world, world.settings, own
        table = world.store.dataset().to_table(filter=f"url = '{URL}'")
        (self.id,), (self.sha256,) = to_hex(table["id"]), to_hex(table["image_sha256"])
        self.image = table["image"][0].as_py()
        own_latents = rows_with(world.examples().real_table.dataset(), "id", [self.id], ["latents"])["latents"]
        features = table[world.identity.column]
        arrays = [column.combine_chunks().flatten().to_numpy() for column in (own_latents, features)]
        self.looks = np.random.default_rng(0).standard_normal(64).astype(np.float32)
        self.traces = (self.image, b64encode(self.image), *(array.tobytes() for array in (*arrays, self.looks)))
        self._write_shards()
        self._evaluate()
        self._register()
        write_page(world, self.settings.home / NAME, self.id)

    def _write_shards(self) -> None:
        uri = Path(self.settings.shards_of(NAME))
        samples = [
            Sample(f"https://example.org/{number}.png", caption, drawing(number))
            for number, caption in enumerate(CAPTIONS)
        ]
        write_shard(uri, 0, samples)
        want(uri, samples)

    def _evaluate(self) -> None:
        folder = Path(self.settings.training_of(NAME)) / "evaluations" / "e1"
        write_page(self.world, folder, self.id)
        self.evaluation_run = start_run(self.settings, "evaluate", "e1", {})
        (folder / "results.json").write_text(json.dumps({"evaluated": {"run_id": self.evaluation_run}}))
        shown = [[{"id": self.id}], [{"id": "another"}]]
        columns = (pa.field("image", pa.large_binary()), pa.field("references", pa.string()))
        table = KeyedTable.of(str(folder.parent), "pictures", {"index": 1}, columns)
        rows = {
            "id": pa.array([b"a" * 20, b"b" * 20], ID),
            "image": [self.image, b""],
            "references": [json.dumps(own) for own in shown],
        }
        table.append(pa.table(rows, schema=table.schema))
        self.looked_at = [self._look(str(folder.parent), of, rows["id"]) for of in (table.name, NAME)]
        validation = {"references_uri": self.world.examples().references_table.table_uri}
        self.training_run = start_run(self.settings, "finetune", "t1", {}, validation)
        for run_id, name in (
            (self.evaluation_run, "index.html"), (self.evaluation_run, "grid.png"), (self.training_run, "000001.png"),
        ):  # fmt: skip
            with MlflowTracker(tracking_uri(self.settings), run_id) as tracker:
                if name.startswith("0"):
                    tracker.image(f"validation/{name}", Image.open(folder / "grid.png"))
                else:
                    tracker.file(name, (folder / name).read_bytes())

    def _look(self, folder: str, of: str, ids: pa.Array) -> Path:
        """Write a metric's features of pictures, or of the index's images."""
        table = KeyedTable.of(folder, FEATURES, {"of": of}, [pa.field("values", pa.list_(pa.float32()))])
        if of == NAME:
            ids = pa.array([from_hex([self.id], ID)[0].as_py(), b"another image's id.."], ID)
        values = [self.looks.tolist(), [0.0] * 64]
        table.append(pa.table({"id": ids, "values": values}, schema=table.schema))
        return Path(table.table_uri)

    def _register(self) -> None:
        grid = Path(self.settings.training_of(NAME)) / "evaluations" / "e1" / "grid.png"
        register(self.own, self.settings, grid=grid, evaluation_run=self.evaluation_run)
        register(self.own, self.settings, portable=True)
        promote(self.settings, 2, reason="it travels", author="somebody")
        home, version = self.settings.home, self.world.store.version
        for model in (home / "models" / "2-abc" / "artifacts" / "package", home / NAME / "model-2"):
            self.world.store.copy(version, str(model / "index"))  # as a fetched champion and a pulled model have it
        (home / NAME / "model-2" / "model_index.json").write_text("{}")


@pytest.fixture
def everything(own_world: World, finetuned: Callable[..., Finetuned], monkeypatch: pytest.MonkeyPatch) -> Everything:
    # Fragments of three rows are as large as they may be: none is rewritten but for what was deleted of it.
    monkeypatch.setattr(lance_table, "_FRAGMENT_ROWS", 3)
    own_world.add(10, ["green castle"], [drawing(30)])
    monkeypatch.setenv("IMAGERAG_HOME", str(own_world.settings.home))
    return Everything(own_world, finetuned(own_world, tracked=True))


def test_no_file_under_the_home_holds_it(everything: Everything) -> None:
    home, settings = everything.settings.home, everything.settings
    held = files_with(home, *everything.traces)
    for part in (
        "shards/", "index/", "/real-", "evaluations/e1/", "/features-", "mlflow/artifacts", "models/2-abc", "model-2",
    ):  # fmt: skip
        assert any(part in path for path in held), part
    assert len(everything.world.store.dataset().get_fragments()) > 1

    target = takedown.find(settings, NAME, urls=[URL])
    assert target.image_sha256s == (everything.sha256,)
    done = takedown.take_down(settings, NAME, target)

    assert files_with(home, *everything.traces) == []
    assert [path.exists() for path in everything.looked_at] == [False, True], "other images' features stay"
    assert done.num_samples == 1
    assert done.removal is not None
    assert done.removal.num_rows == 1
    assert everything.world.store.count() == 10
    assert everything.id not in to_hex(everything.world.examples().real_table.ids())
    assert len(everything.world.examples().real_table.ids().to_pylist()) == 10
    assert [info.version for info in list_versions(settings)] == [1]
    report = Path(done.uri).read_text()
    assert Path(done.uri).parent == Path(settings.shards_of(NAME), "takedowns")
    for part in (
        everything.sha256, everything.id, URL, "1 latents in", "1 images' features in",
        f"MLflow run {everything.evaluation_run}: index.html", f"MLflow run {everything.training_run}: validation",
        "imagerag-turbo 1: grid.png", "version 2 of imagerag-turbo, which was candidate and champion, with its copy",
        "whoever pulled or downloaded version 2", f"adapter {everything.own.uri} learnt from the images",
        "register it again on version", "backups",
    ):  # fmt: skip
        assert in_markdown(part) in report, part

    again = takedown.take_down(settings, NAME, takedown.find(settings, NAME, ids=[everything.id]))
    assert (again.num_samples, again.sweep.deleted) == (0, ()), "a second time there is nothing left to do"


def test_what_lists_and_stores_say_is_no_markdown_in_a_report() -> None:
    said = "https://evil.example/a.jpg <img src=https://evil.example/beacon.png> [click](javascript:alert(1))"
    target = takedown.Target(ids=("ab",), urls=(said,), image_sha256s=("cd",), asked={"url": [said]})
    report = make_report(NAME, datetime(2026, 1, 2), target, 1, None, Sweep(deleted=(said,), left=(said,)))
    assert report.count(in_markdown(said)) == 4
    assert "evil.example" not in report
    assert "[click]" not in report


def test_every_takedown_has_a_report_of_its_own(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the same second, as a script's are."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(takedown, "datetime", Clock)
    settings, done = own_world.settings, []
    urls = own_world.store.dataset().to_table(columns=["url"], limit=2)["url"].to_pylist()
    for url in urls:
        done.append(takedown.take_down(settings, NAME, takedown.find(settings, NAME, urls=[url])))
    first, second = (Path(each.uri) for each in done)
    assert [path.name for path in (first, second)] == ["2026-01-02T03-04-05.md", "2026-01-02T03-04-05-2.md"]
    assert [in_markdown(url) in path.read_text() for path in (first, second) for url in urls] == [
        True, False, False, True
    ]  # fmt: skip


def test_a_takedown_that_was_killed_as_it_deleted_tables_goes_on(everything: Everything) -> None:
    settings, world = everything.settings, everything.world
    references = Path(world.examples().references_table.table_uri)
    (pictures,) = Path(settings.training_of(NAME), "evaluations").glob("pictures-*.lance")
    copy = settings.home / NAME / "model-2" / "index" / f"{NAME}.lance"
    target = takedown.find(settings, NAME, urls=[URL])
    for table in (references, copy):
        next(table.glob("data/*")).unlink()
    shutil.rmtree(pictures / "_versions")
    takedown.take_down(settings, NAME, target)
    assert not any(table.exists() for table in (references, pictures, copy))
    assert files_with(settings.home, *everything.traces) == []


def test_an_image_that_left_the_index_is_taken_down(everything: Everything) -> None:
    """From the shards, the models and whatever else was made of it before."""
    world = everything.world
    world.store.delete([everything.id])
    for start in (100, 200):
        append(world.store, make_rows(start, start + 1, world.store.encoder))
        world.fill()
        index_and_publish(world.store, PublishConfig(keep=1))
    result = CliRunner().invoke(app, ["index", "remove", "--name", NAME, "--url", URL, "--yes"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "removed 1 images from the shards" in result.output
    assert files_with(everything.settings.home, *everything.traces) == []


def test_a_copy_of_the_index_in_no_models_folder_is_named_and_stays(own_world: World) -> None:
    """A copy of a whole home is not a model."""
    home, store = own_world.settings.home, own_world.store
    backup, pulled = home / "backup", home / "model"
    for folder in (backup, pulled):
        store.copy(store.version, str(folder / "index"))
    (backup / "notes.txt").write_text("of another home")
    (pulled / "model_index.json").write_text("{}")
    ids = store.dataset().to_table(columns=["id"], limit=1)["id"].combine_chunks()
    swept = takedown._sweep_copies(own_world.settings, store, ids)
    assert swept.deleted == (str(pulled),)
    assert not pulled.exists()
    assert (backup / "notes.txt").is_file()
    assert swept.left == (f"{backup / 'index' / NAME}.lance is a copy of the index outside of a model's folder",)


def test_tables_of_early_versions_are_deleted_whole(own_world: World) -> None:
    """Their ids were texts: which rows they have can't be told."""
    folder = own_world.settings.training_of(NAME)
    early = [LanceTable(folder, f"{kind}-early") for kind in ("real", "references")]
    for table in early:
        table.append(pa.table({"id": ["0" * 40]}))
    swept = takedown._sweep_training(own_world.settings, NAME, own_world.store.ids()[:1].combine_chunks())
    assert not any(table.exists for table in early)
    assert {table.table_uri for table in early} <= set(swept.deleted)


def test_what_was_never_there_is_named(own_world: World) -> None:
    version = own_world.store.version
    for wanted in ({"urls": [URL, "https://example.org/nope"]}, {"ids": ["0" * 40]}, {"sha256s": ["0" * 64]}):
        with pytest.raises(UserError, match=r"'images' never had an image of the .*; nothing was taken down"):
            takedown.find(own_world.settings, NAME, **wanted)
    with pytest.raises(UserError, match="40 hexadecimal digits, got 'x'"):
        takedown.find(own_world.settings, NAME, ids=["x"])
    with pytest.raises(UserError, match="at least one URL"):
        takedown.find(own_world.settings, NAME)
    assert own_world.store.version == version
