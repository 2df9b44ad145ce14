"""What a step learns from."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from imagerag.artifacts import TrainingSet
from imagerag.base.model import BaseModel, load_base
from imagerag.errors import UserError
from imagerag.hspace.encode import encode_latents, encode_references, open_images
from imagerag.retrieval.takedown import remove_rows
from imagerag.training import data as data_module
from imagerag.training.config import FinetuneConfig, ReferenceChoice
from imagerag.training.data import RagBatch, RagData
from imagerag.training.loader import Loader, micro_batch
from tests.generation.with_index import CAPTIONS, drawing
from tests.training.conftest import HELD_OUT, World

FOUND = ReferenceChoice.found(3)
NOTHING = ReferenceChoice(number=3, own=0.0, own_among=0.0, none=1.0, random=0.0)


@pytest.fixture
def data(world: World, training_set: TrainingSet) -> RagData:
    return world.data(training_set)


@pytest.fixture
def base(world: World) -> BaseModel:
    return load_base(world.base, "cpu")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def config(**changes: object) -> FinetuneConfig:
    values = {"steps": 6, "batch_size": 8, "micro_batch_size": 4, "references": FOUND}
    return FinetuneConfig(**values | changes)  # type: ignore[arg-type]


def example_of(data: RagData, caption: str) -> int:
    """The example of the index's row with this caption."""
    rows = np.flatnonzero(data.places.own >= 0)
    return int(rows[data.prompts(rows).index(caption)])


def test_an_example_is_what_the_base_model_makes_of_its_row(data: RagData, base: BaseModel) -> None:
    row = example_of(data, "doughnut")
    batch = data.read(np.array([row]), FOUND, rng())
    image = drawing(CAPTIONS.index("doughnut"))
    expected = encode_latents(base.vae, base.unet, open_images([image]), "auto")
    assert torch.allclose(batch.latents, expected, atol=2e-3 * float(expected.abs().max()))
    text = base.conditioner.encode(["doughnut"]).embeds
    assert torch.allclose(batch.text, text, atol=2e-3 * float(text.abs().max()))


def test_references_are_the_features_that_are_cached(data: RagData, base: BaseModel) -> None:
    row = example_of(data, "castle")
    batch = data.read(np.array([row]), FOUND, rng())
    expected = encode_references(base.vae, base.unet, base.conditioner, open_images([drawing(20)]), ["castle"], "auto")
    assert torch.allclose(batch.h_references[0, 0], expected[0], atol=2e-3 * float(expected.abs().max()))
    assert float(batch.similarities[0, 0]) == pytest.approx(1.0, abs=2e-3), "the other castle has the same caption"
    assert (batch.similarities[0, 1:] < 0.9).all()


def test_nothing_that_is_held_out_is_learnt_from_or_shown(data: RagData) -> None:
    assert set(data.prompts(data.held_out)) == set(HELD_OUT)
    assert not set(data.prompts(data.learnt)) & set(HELD_OUT)
    own_of_held_out = set(data.places.own[data.held_out])
    assert not own_of_held_out & set(data.places.references[data.learnt].ravel().tolist())
    strange = FOUND.model_copy(update={"random": 1.0})
    shown = np.concatenate([data.choose(data.learnt, strange, rng(seed)) for seed in range(30)])
    assert not own_of_held_out & set(shown.ravel().tolist())
    assert len(set(shown.ravel().tolist()) - {-1}) == 8, "every other row is shown to something"


def test_what_is_found_for_an_example_is_never_its_picture(data: RagData) -> None:
    hashes = np.array(data._index.read(["image_sha256"])["image_sha256"].to_pylist())
    for row in np.concatenate([data.learnt, data.held_out]):
        own, references = data.places.own[row], data.places.references[row]
        if own >= 0:
            assert hashes[own] not in hashes[references[references >= 0]]
    strange = ReferenceChoice.found(16).model_copy(update={"random": 1.0})
    for seed in range(20):
        chosen = data.choose(data.learnt, strange, rng(seed))
        assert (chosen != data.places.own[data.learnt][:, None])[chosen >= 0].all()


def test_the_shares_are_what_was_asked_for(data: RagData) -> None:
    choice = ReferenceChoice(number=3, own=0.3, own_among=0.2, none=0.25, random=0.1)
    rows = np.resize([row for row in data.learnt if data.places.own[row] >= 0], 4_000)
    chosen, own = data.choose(rows, choice, rng()), data.places.own[rows][:, None]
    found = data.places.references[rows, :3]
    alone = np.concatenate([own, np.full((len(rows), 2), -1)], axis=1)
    among = np.concatenate([own, found[:, :2]], axis=1)
    nothing = np.full((len(rows), 3), -1)
    for expected, share in ((alone, 0.3), (among, 0.2), (nothing, 0.25), (found, 0.15)):
        assert (chosen == expected).all(1).mean() == pytest.approx(share, abs=0.03)


def test_a_row_that_is_shown_itself_is_as_near_as_can_be(data: RagData) -> None:
    rows = np.array([row for row in data.learnt if data.places.own[row] >= 0])
    batch = data.read(rows, ReferenceChoice(number=2, own=1.0, own_among=0.0, none=0.0, random=0.0), rng())
    assert torch.allclose(batch.similarities[:, 0], torch.ones(len(rows)), atol=2e-3)
    assert (batch.similarities[:, 1] == -1).all()


def test_a_teachers_picture_has_no_row_and_is_shown_its_neighbours(data: RagData) -> None:
    teachers = np.array([row for row in data.learnt if data.places.own[row] < 0])
    choice = ReferenceChoice(number=3, own=0.5, own_among=0.5, none=0.0, random=0.0)
    assert (data.choose(teachers, choice, rng()) == data.places.references[teachers, :3]).all()


def test_a_row_without_references_has_none(data: RagData) -> None:
    batch = data.read(data.learnt[:2], NOTHING, rng())
    assert (batch.similarities == -1).all()
    assert (batch.h_references == 0).all()
    assert data.read(data.learnt[:2], ReferenceChoice(number=0), rng()).h_references.shape[1] == 0


def test_teachers_examples_have_references_too(data: RagData) -> None:
    teachers = [row for row in data.learnt if data.places.own[row] < 0]
    assert len(teachers) == 5
    batch = data.read(np.array(teachers), FOUND, rng())
    assert (batch.similarities > -1).all()
    assert batch.latents.std() > 0.1


def test_every_example_is_learnt_from_before_any_is_again(data: RagData) -> None:
    num = len(data.learnt)
    seen = np.concatenate([micro_batch(data, config(), step, number) for step in range(6) for number in range(2)])
    for epoch in range(len(seen) // num):
        assert sorted(seen[epoch * num : (epoch + 1) * num]) == sorted(data.learnt)


def equal(one: RagBatch, other: RagBatch) -> bool:
    tensors = [name for name in one.__dataclass_fields__ if name != "added"]  # this base model is told nothing more
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)


def test_batches_depend_on_nothing_but_their_number(data: RagData) -> None:
    """Neither on where reading began, nor on how many workers share it."""

    def read(first: int = 0, **share: int) -> list[list[RagBatch]]:
        steps = Loader(data, config(), torch.device("cpu"), **share).steps(first)
        return [[load().batch for load in loads] for loads in steps]

    whole = read()
    assert [len(step) for step in whole] == [2] * 6
    later = read(first=3)
    assert all(
        equal(a, b) for one, other in zip(whole[3:], later, strict=True) for a, b in zip(one, other, strict=True)
    )
    for rank in range(2):
        share = read(rank=rank, num_workers=2)
        assert all(len(own) == 1 and equal(own[0], step[rank]) for own, step in zip(share, whole, strict=True))
    assert not equal(whole[0][0], whole[1][0])


def test_micro_batches_are_read_ahead_but_not_a_step_of_them(data: RagData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the paper's has 64: neither those to come nor those that were run may fill the host's memory."""
    references: list[weakref.ref[torch.Tensor]] = []
    read = data.read

    def noted(*arguments: Any) -> RagBatch:
        batch = read(*arguments)
        references.append(weakref.ref(batch.h_references))
        return batch

    monkeypatch.setattr(data, "read", noted)
    loader = Loader(data, config(steps=2, micro_batch_size=1), torch.device("cpu"))
    held = []
    for loads in loader.steps(0):
        for load in loads:
            loaded = load()
            loader._pool.submit(lambda: None).result()  # what was submitted before is read
            held.append(sum(each() is not None for each in references))
            assert loaded.batch.h_references is references[len(held) - 1]()
            del loaded
    assert held == [3] * 14 + [2, 1], "one that is run and two that are next"
    assert len(references) == 16, "each was read once"


@pytest.mark.parametrize("choice", [FOUND, NOTHING])
def test_what_does_not_fit_in_memory_is_read_from_files(
    data: RagData, world: World, training_set: TrainingSet, choice: ReferenceChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "_KEPT_BYTES", 0)
    from_files = world.data(training_set)
    rows = np.concatenate([data.learnt, data.held_out])[::-1]
    assert equal(from_files.read(rows, choice, rng()), data.read(rows, choice, rng()))


def test_a_set_of_which_something_was_taken_down_is_not_learnt_from_any_more(own_world: World) -> None:
    made = own_world.synthesize()
    data = own_world.data(made)
    data.check()
    remove_rows(own_world.store, ids=[own_world.store.ids()[0].as_py().hex()])
    with pytest.raises(UserError, match=f"version {made.index_version} of table 'images' .* is gone"):
        data.check()


def test_a_set_whose_latents_are_gone_is_refused(own_world: World) -> None:
    made = own_world.synthesize()
    own_world.examples().real_table.keep(own_world.examples().rows["id"].slice(2))
    with pytest.raises(UserError, match="lacks 2 latents, which were deleted: make it again"):
        own_world.data(made)
