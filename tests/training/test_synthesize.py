"""A training set: made once, continued, and never more than what is missing."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagerag.artifacts import TrainingSet
from imagerag.base.model import load_base
from imagerag.errors import UserError
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.encode import encode_latents
from imagerag.retrieval.pins import TRAINING, pin, pins, unpin
from imagerag.retrieval.publish import PublishConfig, require_published
from imagerag.storage.keyed_table import from_column, shape_of
from imagerag.training import examples
from imagerag.training.config import ReferenceChoice, SynthesizeConfig, tiny
from imagerag.training.finetune import key_of
from imagerag.training.perceptual import choose_perceptual
from imagerag.training.synthesize import drop_unreachable, seed_of, synthesize
from tests.generation.folders import write_sd
from tests.generation.with_index import drawing
from tests.retrieval.rows import index_and_publish
from tests.training.conftest import HELD_OUT, NAME, World


@pytest.mark.usefixtures("jobs_here")
def test_a_job_that_was_stopped_goes_on(own_world: World) -> None:
    """What was committed stays, and a third call has nothing to do."""
    config = own_world.config(num_teacher_latents=3, commit_every_s=0)

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int, note: str = "") -> None:
        assert total == 10 + 3 + 13
        raise StoppedError(note)

    with pytest.raises(StoppedError, match="latents of pictures"):
        synthesize(NAME, config, own_world.settings, stop)
    seen: list[tuple[int, int, str]] = []
    made = synthesize(NAME, config, own_world.settings, lambda *progress: seen.append(progress))
    assert made.num_added == 3 + 13
    assert seen[-1][:2] == (16, 16)
    assert (made.num_real, made.num_teacher, made.num_held_out) == (10, 3, 2)
    again = synthesize(NAME, config, own_world.settings, lambda *progress: pytest.fail(f"worked on {progress}"))
    assert again.num_added == 0
    here = own_world.synthesize(num_teacher_latents=3)
    assert (here.references_uri, here.num_added) == (made.references_uri, 0), "the same set, wherever it was made"


def test_another_version_of_the_index_costs_only_its_new_rows(own_world: World) -> None:
    first = own_world.synthesize()
    assert first.num_added == 10 + 10
    own_world.add(10, ["green castle"], [drawing(30)])
    second = own_world.synthesize()
    assert second.num_added == 1 + 11, "one more picture's latents, and all references"
    assert second.real_uri == first.real_uri
    assert second.references_uri != first.references_uri


def test_latents_are_of_pictures_that_are_fitted_as_for_their_features(own_world: World) -> None:
    wide = Image.new("RGB", (48, 16), "white")
    wide.paste("red", (4, 4, 44, 12))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    own_world.add(10, ["green castle"], [buffer.getvalue()])
    base = load_base(own_world.base, "cpu")

    def learnt(made: TrainingSet) -> np.ndarray:
        data = own_world.data(made)
        row = data.prompts(np.arange(len(data.places.own))).index("green castle")
        return data.read(np.array([row]), ReferenceChoice(), np.random.default_rng(0)).latents.numpy()

    padded = own_world.synthesize()
    own_world.fill("crop")
    index_and_publish(own_world.store)
    cropped = own_world.synthesize()
    assert cropped.num_added == 11 + 11, "all latents are other ones, and so is the index's version"
    assert cropped.real_uri != padded.real_uri
    training = choose_perceptual(tiny().training, "tiny")
    assert key_of(cropped, training, None) != key_of(padded, training, None)
    expected = {fit: encode_latents(base.vae, base.unet, [wide], fit).numpy() for fit in ("pad", "crop")}
    assert np.allclose(learnt(padded), expected["pad"], atol=5e-3 * np.abs(expected["pad"]).max())
    assert np.allclose(learnt(cropped), expected["crop"], atol=5e-3 * np.abs(expected["crop"]).max())


def test_what_is_taken_down_is_in_no_training_set(own_world: World) -> None:
    own_world.synthesize()
    gone = own_world.store.ids()[0].as_py()
    own_world.store.delete([gone.hex()])
    own_world.fill()
    index_and_publish(own_world.store)
    examples = own_world.examples()
    examples.real_table.keep(examples.rows["id"])
    assert gone not in own_world.examples().real_table.ids().to_pylist()
    version = examples.real_table.dataset().version
    examples.real_table.keep(examples.rows["id"])
    assert examples.real_table.dataset().version == version, "nothing to delete, nothing rewritten"
    own_world.synthesize()
    assert gone not in own_world.examples().references_table.ids().to_pylist()


def test_a_training_that_pinned_an_earlier_version_keeps_its_latents(own_world: World) -> None:
    own_world.synthesize()
    table, store = own_world.examples().real_table, own_world.store
    gone = store.ids()[0].as_py()
    for label in pins(store):  # of trainings that other tests stopped in the world that this one is a copy of
        unpin(store, label)
    pin(store, require_published(store), f"{TRAINING}one")
    store.delete([gone.hex()])
    own_world.fill()
    keep_one = PublishConfig(keep=1)
    assert index_and_publish(store, keep_one).published
    drop_unreachable(table, store)
    assert gone in table.ids().to_pylist()
    unpin(store, f"{TRAINING}one")
    drop_unreachable(table, store)
    assert gone not in table.ids().to_pylist()


def test_more_teachers_latents_cost_only_the_new_ones(own_world: World) -> None:
    own_world.synthesize(num_teacher_latents=2)
    more = own_world.synthesize(num_teacher_latents=5)
    assert more.num_added == 3 + 3


def test_a_teachers_latent_is_its_picture_of_the_prompt(world: World, training_set: Any) -> None:
    examples = world.examples(num_teacher_latents=5)
    rows = examples.teacher_table.dataset().to_table()
    pipeline = ImageRAGTurboPipeline.from_base(load_base(world.base, "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    listed = examples.teacher_rows().to_pylist()
    assert len({each["prompt"] for each in listed} & set(HELD_OUT)) == 0
    for row in listed[:2]:
        place = rows["id"].to_pylist().index(row["id"])
        own = from_column(rows["latents"], shape_of(examples.teacher_table.schema.field("latents")))[place]
        expected = pipeline(
            row["prompt"], num_inference_steps=2, guidance_scale=7.5, output_type="latent",
            generator=torch.Generator().manual_seed(seed_of(row["id"])),
        ).images[0].numpy()  # fmt: skip
        assert np.allclose(own, expected, atol=5e-3 * np.abs(expected).max())


def test_a_new_caption_costs_only_its_own_teachers_latents(own_world: World) -> None:
    before = own_world.examples(num_teacher_latents=20)
    old, table = before.teacher_rows()["id"].to_pylist(), before.teacher_table.digest
    assert len(set(old)) == 20, "8 prompts, some of them three times"
    own_world.add(10, ["a tractor"], [drawing(3)])
    after = own_world.examples(num_teacher_latents=20)
    assert after.teacher_table.digest == table
    new = after.teacher_rows()
    added = [row["prompt"] for row in new.to_pylist() if row["id"] not in old]
    assert set(added) <= {"a tractor"}
    assert len(added) >= 2


def test_without_a_file_the_same_captions_are_held_out_every_time(world: World) -> None:
    chosen = [world.examples(held_out=None, held_out_share=0.3).held_out for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert 0 < len(chosen[0]) < 10
    assert world.examples(held_out=None, held_out_share=0.6).held_out > chosen[0]


def test_enough_of_a_small_index_is_held_out_for_the_gate(own_world: World) -> None:
    def held_out() -> frozenset[str]:
        return own_world.examples(held_out=None, held_out_share=1e-9).held_out

    before = held_out()
    assert len(before) == 1, "a fifth of nine captions"
    captions = [f"thing {number}" for number in range(120)]
    own_world.add(10, captions, [drawing(0)] * len(captions))
    assert len(held_out()) == 20
    assert held_out() - before <= set(captions), "earlier trainings have learnt from the others"


@pytest.mark.parametrize(
    ("lines", "changes", "fault"),
    [
        ("nothing of this", {}, "none of the 1 captions in .* is in the index"),
        (None, {}, "has to be a readable text file"),
        ("red dragon\ngreen dragon\ncastle\nharp\ndoughnut\nllama\nbicycle\nrain cloud", {}, "all 10 rows are"),
    ],
)
def test_what_holds_out_too_little_or_too_much_is_refused(
    own_world: World, lines: str | None, changes: dict[str, Any], fault: str
) -> None:
    if lines is None:
        own_world.held_out.unlink()
    else:
        own_world.held_out.write_text(lines)
    with pytest.raises(UserError, match=fault):
        own_world.examples(**changes).check()


def test_prompts_that_are_held_out_are_refused(own_world: World) -> None:
    path = own_world.held_out.with_name("prompts.txt")
    path.write_text("a castle\nharp\n")
    with pytest.raises(UserError, match="'harp', which is held out"):
        own_world.examples(prompts=str(path), num_teacher_latents=1).teacher_rows()


def test_a_teacher_of_another_shape_is_refused(own_world: World, tmp_path: Any) -> None:
    teacher = str(write_sd(tmp_path))
    with pytest.raises(UserError, match=r"cross_attention_dim is 384 in .* and 32 in"):
        own_world.examples(teacher=teacher).check()


def test_an_index_without_features_is_refused(own_world: World, tmp_path: Any) -> None:
    config = SynthesizeConfig(base="tiny", teacher="tiny-teacher", held_out=str(own_world.held_out))
    with pytest.raises(UserError, match=r"has cached features for .*, and none for tiny .*: `imagerag features` makes"):
        synthesize(NAME, config, own_world.settings)


@pytest.mark.parametrize("count", [0, 1, 30, 200, 1_000])
def test_the_teachers_prompts_are_the_first_by_hash(count: int) -> None:
    texts = [f"a number {number % 200}" for number in np.random.default_rng(0).permutation(1_000)]
    expected = sorted(set(texts), key=lambda text: examples._hash(f"7\0{text}"))
    assert examples._first(texts, count, seed=7) == expected[:count]
