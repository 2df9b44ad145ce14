"""An evaluation: made once, continued, and never more than what is missing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from imagerag.artifacts import Deployed, Finetuned
from imagerag.base.model import load_base
from imagerag.errors import UserError
from imagerag.evaluation import pictures
from imagerag.evaluation.config import EvaluateConfig, MetricFiles
from imagerag.evaluation.evaluate import EXPERIMENT, evaluate
from imagerag.evaluation.feature_job import FeatureJob
from imagerag.evaluation.networks import networks_of
from imagerag.evaluation.results import GRID, PAGE, RESULTS, TABLE, read_results
from imagerag.evaluation.ways import ways_of
from imagerag.generation.finetuned import load_finetuned
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.retrieval.config import PublishConfig
from imagerag.retrieval.publish import require_published
from imagerag.settings import Settings
from imagerag.storage.hexadecimal import to_hex
from imagerag.training.finetune import newest_finetuned, read_finetuned
from imagerag.training.tracking import tracking_uri
from tests.evaluation.networks import write_clip
from tests.retrieval.rows import index_and_publish
from tests.training.conftest import HELD_OUT, NAME, World

WAYS = ("base", "slerp", "best_slerp", "adapter", "random", "no_references", "teacher")
NUM_MADE = 6 + 5 + 2
"""Ways whose pictures are made, w's of slerp that are no way's, and scales."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    clip = str(write_clip(tmp_path_factory.mktemp("clip")))
    return EvaluateConfig(images_per_prompt=2, teacher_steps=2, batch_size=2, files=MetricFiles(clip=clip))


@pytest.mark.usefixtures("jobs_here")
def test_an_evaluation_that_was_stopped_goes_on_and_is_done_once(
    own_world: World, finetuned: Callable[..., Finetuned], config: EvaluateConfig
) -> None:
    own, settings = finetuned(own_world), own_world.settings

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int, note: str = "") -> None:
        assert total == NUM_MADE * 2 * 2, "two prompts, two pictures of each"
        raise StoppedError(note)

    with pytest.raises(StoppedError):
        evaluate(own, config, settings, stop, metric="clip_score")
    seen: list[tuple[int, int, str]] = []
    made = evaluate(own, config, settings, lambda *each: seen.append(each), metric="clip_score")
    assert next(total for _, total, _ in seen) == (NUM_MADE - 1) * 2 * 2, "those of one way were there"
    assert made.is_new
    assert all(done <= total for done, total, _ in seen)
    assert (NUM_MADE, NUM_MADE) in [(done, total) for done, total, note in seen if note.startswith("measured")]
    assert {path.name for path in Path(made.uri).iterdir()} == {PAGE, TABLE, GRID, RESULTS}
    results = read_results(made.uri)
    assert set(results.prompts) == set(HELD_OUT)
    assert tuple(way.name for way in results.ways) == WAYS
    assert set(results.metrics) == {"clip_score"}
    assert "needs 100 index rows whose captions are not prompts" in results.not_measured["text_score"]
    assert results.not_measured["fid"] == "needs files.inception"
    assert results.leakage.num_prompts_learnt == 0
    assert results.leakage.num_images == 2
    for way in results.ways:
        assert way.num_pictures == 4
        assert way.latency is not None
        # Of every call a part takes less than the whole, so its median does too; the medians' sum may be anything.
        parts = (way.latency.text, way.latency.denoising, way.latency.decoding)
        assert all(0 < part < way.latency.total for part in parts)
        assert (way.latency.retrieval > 0) == (way.retrieval is not None)
        assert (way.retrieval is not None) == (way.name in ("slerp", "best_slerp", "adapter", "random"))
        assert way.latency.slowdown > 0
    assert [(point.curve, point.setting) for point in results.points] == [
        ("adapter", 1.0), ("adapter", 1.5), ("adapter", 2.0),
        ("slerp", -0.5), ("slerp", 0.0), ("slerp", 0.2), ("slerp", 0.4), ("slerp", 0.6), ("slerp", 0.8),
    ]  # fmt: skip
    adapter, random = results.way("adapter"), results.way("random")
    assert adapter is not None
    assert random is not None
    assert adapter.retrieval is not None
    assert random.retrieval is not None
    assert adapter.retrieval.hit_rate == 1
    assert adapter.retrieval.similarity > random.retrieval.similarity

    again = evaluate(own, config, settings, lambda *each: pytest.fail(f"worked on {each}"), metric="clip_score")
    assert not again.is_new
    assert again.metrics == made.metrics

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(settings))
    (experiment,) = client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == made.run_id
    assert run.data.metrics["adapter/clip_score"] == pytest.approx(made.metrics["adapter/clip_score"])
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {PAGE, TABLE, GRID}


def job_of(world: World, own: Finetuned, config: EvaluateConfig, champion: str | None = None) -> pictures.PictureJob:
    index = world.store.index_version(require_published(world.store))
    deployed = None if champion is None else Deployed(folder=champion, index=index)
    return pictures.PictureJob(
        HELD_OUT,
        ways_of(config, own, own.base, index, deployed),
        config,
        f"{world.settings.training_of(NAME)}/evaluations",
    )


def make_here(job: pictures.PictureJob) -> dict[str, int]:
    """Make what a job lacks in this process, and return how many pictures of each way that was."""
    worker = pictures.Worker(ways=job.ways, tables=job._tables, config=job._config, device="cpu", dtype=None)
    made = {}
    for name, table in job._tables.items():
        rows = job._missing(table)
        made[name] = rows.num_rows
        if rows.num_rows:
            (written,), _ = worker(rows.append_column("way", pa.array([name] * rows.num_rows)))
            table.commit(json.loads(written)["fragments"], table.version)
    return made


def test_slerp_has_the_base_models_weight_unless_it_is_told_another(
    own_world: World, finetuned: Callable[..., Finetuned], config: EvaluateConfig
) -> None:
    own = finetuned(own_world)
    index = Path(own.base, "model_index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"slerp_w": 0.3}))
    version = own_world.store.index_version(require_published(own_world.store))
    for told, expected in ((None, 0.3), (0.6, 0.6)):
        ways = ways_of(config.model_copy(update={"slerp_w": told}), own, own.base, version, None)
        assert [(way.title, way.w) for way in ways if way.name == "slerp"] == [(f"slerp, w = {expected}", expected)]


def test_an_adapter_is_measured_at_its_own_scale_as_it_is_deployed(
    own_world: World, finetuned: Callable[..., Finetuned], config: EvaluateConfig
) -> None:
    own = finetuned(own_world)
    path = Path(own.uri, "adapter", "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"default_scale": 1.25}))
    version = own_world.store.index_version(require_published(own_world.store))
    deployed = Deployed(folder=own.uri, index=version)
    ways = {way.name: way for way in ways_of(config, own, own.base, version, deployed)}
    assert {ways[name].adapter_scale for name in ("adapter", "random", "no_references")} == {1.25}
    assert ways["adapter, scale 1.5"].adapter_scale == 1.5


def test_another_candidate_costs_only_its_own_pictures(
    own_world: World, finetuned: Callable[..., Finetuned], config: EvaluateConfig
) -> None:
    """And the same weights in another place cost nothing, as champion too."""
    ways = ("base", "slerp", "best_slerp", "adapter", "champion")
    few = {"ways": ways, "images_per_prompt": 1, "slerp_ws": (0.2, 0.8), "adapter_scales": ()}
    config = config.model_copy(update=few)
    first = finetuned(own_world)
    made_first = make_here(job_of(own_world, first, config))
    assert made_first == {"base": 2, "slerp": 2, "adapter": 2, "slerp, w = 0.2": 2}, "0.8 is slerp's own"
    second = finetuned(own_world)
    job = job_of(own_world, second, config, champion=first.uri)
    assert make_here(job) == {"base": 0, "slerp": 0, "adapter": 2, "champion": 0, "slerp, w = 0.2": 0}
    made = {way.name: job.image(way, 0) for way in job.ways}
    assert not np.array_equal(np.asarray(made["adapter"]), np.asarray(made["champion"]))


@pytest.mark.usefixtures("jobs_here")
def test_pictures_of_equal_ways_are_made_once(
    own_world: World, finetuned: Callable[..., Finetuned], config: EvaluateConfig
) -> None:
    """A candidate that is the champion already, with prompts that it was not evaluated on."""
    own = finetuned(own_world)
    few = {"ways": ("base", "slerp", "adapter", "champion"), "images_per_prompt": 1, "adapter_scales": ()}
    config = config.model_copy(update=few)
    job, seen = job_of(own_world, own, config, champion=own.uri), set[int]()
    tables = {way.name: job.source(way).table.name for way in job.ways}
    assert tables["adapter"] == tables["champion"]
    num_pictures = 2 * (len(tables) - 1)
    job.run(own_world.settings, lambda done, total, note="": seen.add(total))
    assert seen == {num_pictures}
    sources = {way.name: job.source(way) for way in job.ways}
    looks = FeatureJob(sources, config, f"{own_world.settings.training_of(NAME)}/evaluations")
    looks.run(own_world.settings, lambda done, total, note="": seen.add(total))
    assert seen == {num_pictures, num_pictures * len(networks_of(config.files))}
    assert np.array_equal(looks.read("adapter", "drawings"), looks.read("champion", "drawings"))


@pytest.mark.usefixtures("jobs_here")
def test_a_champion_may_cite_rows_that_the_new_index_lacks(
    own_world: World, finetuned: Callable[..., Finetuned], config: EvaluateConfig
) -> None:
    own, store = finetuned(own_world), own_world.store
    before = store.index_version(require_published(store))
    rows = store.dataset().to_table(columns=["id", "caption"])
    gone = rows.filter(pc.invert(pc.is_in(rows["caption"], pa.array(HELD_OUT))))["id"]
    store.delete(gone)
    index_and_publish(store, PublishConfig(max_shrink=1.0))
    few = {"ways": ("base", "best_slerp", "adapter", "champion"), "images_per_prompt": 1, "adapter_scales": ()}
    champion = Deployed(folder=own.uri, index=before)
    made = evaluate(
        own, config.model_copy(update=few | {"slerp_ws": (0.2,)}), own_world.settings, champion=champion,
        metric="clip_score",
    )  # fmt: skip
    page = Path(made.uri, PAGE).read_text()
    assert any(id in page for id in to_hex(gone))


def test_a_way_is_what_the_pipeline_makes(
    own_world: World, finetuned: Callable[..., Finetuned], config: EvaluateConfig
) -> None:
    own = finetuned(own_world)
    few = {"ways": ("base", "best_slerp", "adapter"), "images_per_prompt": 1, "slerp_ws": (0.2,)}
    config = config.model_copy(update=few)
    job = job_of(own_world, own, config)
    make_here(job)
    base = load_base(own.base, "cpu")
    pipeline = ImageRAGTurboPipeline.from_base(base, load_finetuned(Path(own.uri), base))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.use_index(own_world.settings.index_uri, NAME)
    arguments: dict[str, dict[str, Any]] = {
        "base": {"fusion": "none"},
        "adapter": {"fusion": "adapter"},
        "slerp, w = 0.2": {"fusion": "slerp", "w": 0.2},
        "adapter, scale 1.5": {"fusion": "adapter", "adapter_scale": 1.5},
        "adapter, scale 2.0": {"fusion": "adapter", "adapter_scale": 2.0},
    }
    assert {way.name for way in job.ways} == set(arguments)
    for way in job.ways:
        for number, prompt in enumerate(HELD_OUT):
            generator = torch.Generator().manual_seed(pictures._seed_of(prompt, 0, 0))
            expected = pipeline(prompt, generator=generator, **arguments[way.name]).images[0]
            difference = np.abs(np.asarray(job.image(way, number), int) - np.asarray(expected, int))
            assert difference.max() <= 1, "a batch's sums are in another order"


def test_mistakes_are_named_before_anything_starts(
    own_world: World, finetuned: Callable[..., Finetuned], config: EvaluateConfig, tmp_path: Path
) -> None:
    own, settings = finetuned(own_world), own_world.settings
    with pytest.raises(UserError, match=r"there is no finetune.json in .*nowhere"):
        read_finetuned(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no adapter was trained on 'other' yet"):
        newest_finetuned(settings, "other")
    assert newest_finetuned(settings, NAME) == replace(own, is_new=False)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\n")
    with pytest.raises(UserError, match=r"at least two prompts; .*prompts.txt has 1"):
        evaluate(own, config.model_copy(update={"prompts": str(prompts)}), settings)
    with pytest.raises(UserError, match="prompts must be a readable text file"):
        evaluate(own, config.model_copy(update={"prompts": str(tmp_path)}), settings)
    with pytest.raises(UserError, match="there is no table 'other'"):
        evaluate(replace(own, index_name="other"), config, Settings(home=settings.home))
    assert not (settings.home / "mlflow").exists()
    assert json.loads(Path(own.uri, "finetune.json").read_text())
