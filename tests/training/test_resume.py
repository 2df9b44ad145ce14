"""A half-done training and an index that moved on in the night."""

from pathlib import Path

from imagerag.retrieval.pins import TRAINING, pin
from imagerag.retrieval.publish import PublishConfig
from imagerag.retrieval.takedown import remove_rows
from imagerag.training.config import FinetuneConfig, LossWeights, SynthesizeConfig, TrainDtype
from imagerag.training.finetune import key_of
from imagerag.training.resume import version_to_learn_from
from tests.generation.with_index import drawing
from tests.retrieval.rows import append, index_and_publish, make_rows
from tests.training.conftest import NAME, World

TRAINING_CONFIG = FinetuneConfig(losses=LossWeights(perceptual=0.0), steps=6, batch_size=8, micro_batch_size=4)


def version_for(
    world: World,
    training: FinetuneConfig = TRAINING_CONFIG,
    dtype: TrainDtype | None = None,
    *,
    anew: bool = False,
) -> int:
    data: SynthesizeConfig = world.config()
    return version_to_learn_from(NAME, data, training, dtype, world.settings, anew=anew)


def test_a_half_done_training_goes_on_where_it_was_begun(own_world: World) -> None:
    begun_on = own_world.store.version
    key = key_of(own_world.synthesize(), TRAINING_CONFIG, None)
    pin(own_world.store, begun_on, TRAINING + key)
    checkpoint = Path(own_world.settings.training_of(NAME)) / "runs" / key / "checkpoint_1"
    assert version_for(own_world) == begun_on
    own_world.add(10, ["green castle"], [drawing(30)])
    append(own_world.store, make_rows(11, 12, own_world.store.encoder))
    own_world.fill()
    published = index_and_publish(own_world.store, PublishConfig(keep=1)).version

    assert version_for(own_world) == published, "no step was done: there is nothing to go on with"
    checkpoint.mkdir(parents=True)
    assert version_for(own_world) == begun_on
    assert version_for(own_world, anew=True) == published
    assert version_for(own_world, TRAINING_CONFIG.model_copy(update={"seed": 1})) == published, "it is another training"
    assert version_for(own_world, dtype="bf16") == published, "so is one in another dtype"

    remove_rows(own_world.store, urls=["https://example.org/3.png"])
    assert version_for(own_world) == own_world.store.version, "what it was begun on was taken down"
