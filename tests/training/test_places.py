"""Where examples' parts are, found once for all workers."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from imagerag.artifacts import TrainingSet
from imagerag.base.model import load_base
from imagerag.compute import start_ray
from imagerag.errors import UserError
from imagerag.storage.hexadecimal import ID
from imagerag.storage.keyed_table import KeyedTable
from imagerag.training import places
from imagerag.training.config import ReferenceChoice
from imagerag.training.data import RagData
from imagerag.training.places import ExamplePlaces, IdPlaces, find_places, to_words
from tests.training.conftest import World

FOUND = ReferenceChoice.found(3)


@pytest.mark.parametrize("digits", [20, 1], ids=["of digests", "that end alike"])
@pytest.mark.parametrize("num_ids", [0, 1, 2, 1_000])
def test_ids_are_found_where_arrow_finds_them(num_ids: int, digits: int) -> None:
    rng = np.random.default_rng(num_ids)
    ids = [rng.bytes(digits) + bytes(20 - digits) for _ in range(num_ids)]
    among = pa.chunked_array([pa.array(ids[:300], ID), pa.array(ids[300:], ID)])
    wanted = pa.chunked_array([pa.array([*ids[::-3], *(rng.bytes(20) for _ in range(100)), *ids[:7]], ID)])
    expected = pa.compute.index_in(wanted, value_set=among).fill_null(-1).to_pylist()
    found = IdPlaces(to_words(among.combine_chunks()))
    assert found.find(wanted).tolist() == expected
    assert found.find(wanted[5:60]).tolist() == expected[5:60]


def test_references_are_the_same_in_any_number_of_batches(
    training_set: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = find_places(training_set)
    monkeypatch.setattr(places, "_BATCH_ROWS", 3)
    assert len(expected.own) > 2 * 3
    assert np.array_equal(find_places(training_set).references, expected.references)


def test_workers_read_the_same_memory(world: World, training_set: TrainingSet, ray_session: None) -> None:
    start_ray(world.settings)  # another test may have stopped it
    import ray

    def owns_a_copy(found: ExamplePlaces) -> bool:
        data = RagData(training_set, load_base(world.base, "cpu"), found)
        rows = data.places.references
        return bool(rows.flags.owndata or rows.flags.writeable)

    large = np.zeros((2**16, 16), np.int32)  # Ray hands small objects on as copies
    found = ray.put(replace(find_places(training_set), references=large))
    assert ray.get([ray.remote(owns_a_copy).remote(found) for _ in range(2)]) == [False, False]


def test_examples_are_the_same_with_places_of_before(world: World, training_set: TrainingSet) -> None:
    base, rng = load_base(world.base, "cpu"), np.random.default_rng
    made = find_places(training_set)
    given, found = RagData(training_set, base, made), RagData(training_set, base)
    batches = [data.read(data.learnt[:6], FOUND, rng(0)) for data in (given, found)]
    for name in ("latents", "text", "h_references", "similarities"):
        assert (getattr(batches[0], name) == getattr(batches[1], name)).all(), name
    assert made.references.dtype == made.own.dtype == made.learnt.dtype == np.int32


def test_places_are_found_anew_if_a_table_was_rewritten(own_world: World) -> None:
    """By a takedown, or by another training's clean-up: a worker would be shown the pictures of other rows."""
    training_set = own_world.synthesize(num_teacher_latents=5)
    base, before = load_base(own_world.base, "cpu"), find_places(training_set)
    table = KeyedTable.at(training_set.real_uri)
    first = table.dataset().take([0], columns=table.schema.names)
    assert table.drop(first["id"]) == 1
    with pytest.raises(UserError, match="lacks 1 latents"):
        RagData(training_set, base, before)

    table.append(first)
    after = RagData(training_set, base, before)
    assert after.places.versions != before.versions
    assert (after.places.latents != before.latents).any()
    assert (after.learnt == before.learnt).all(), "all workers learn from the same examples, whenever they started"
    batch, same = (
        data.read(data.learnt[:6], FOUND, np.random.default_rng(0)) for data in (after, own_world.data(training_set))
    )
    assert (batch.latents == same.latents).all()
