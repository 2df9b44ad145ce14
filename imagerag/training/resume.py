"""Selection of the index version for a training: the published one, unless an unfinished training pins an earlier one.

The version is a part of a training's name, and an index may be updated every night: without this, the next call would
restart a training of several days.
"""

import fsspec

from imagerag.generation.finetuned import MANIFEST
from imagerag.retrieval.pins import TRAINING, pins
from imagerag.retrieval.publish import require_published
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training.config import FinetuneConfig, SynthesizeConfig, TrainDtype
from imagerag.training.examples import Examples
from imagerag.training.finetune import key_of
from imagerag.training.synthesize import describe


def version_to_learn_from(
    name: str,
    data: SynthesizeConfig,
    training: FinetuneConfig,
    dtype: TrainDtype | None,
    settings: Settings,
    *,
    anew: bool = False,
) -> int:
    """Return the index version that a training has to use.

    This is the version pinned by an unfinished training with the same parameters and a checkpoint, if there is one;
    otherwise the published version.

    Args:
        name: name of the corpus.
        data: configuration of the training set.
        training: configuration of the training.
        dtype: dtype of its workers, None if it is left to their device.
        settings: locations of the index and the trainings.
        anew: always use the published version.

    Raises:
        UserError: if nothing was published, or the network of the perceptual loss is missing.
    """
    from imagerag.training.perceptual import choose_perceptual

    store = Store(settings.index_uri, name)
    published = require_published(store)
    pinned = pins(store).items()
    begun = {label.removeprefix(TRAINING): version for label, version in pinned if label.startswith(TRAINING)}
    if anew or not begun:
        return published
    training = choose_perceptual(training, data.base)  # a training's name depends on it

    def key_on(version: int) -> str:
        retriever = Retriever(store.uri, name, version=version)
        return key_of(describe(Examples(retriever, data, settings.training_of(name))), training, dtype)

    filesystem, folder = fsspec.url_to_fs(settings.training_of(name))
    of_published = key_on(published)
    if of_published in begun or filesystem.exists(f"{folder}/finetuned/{of_published}/{MANIFEST}"):
        return published
    for key, version in sorted(begun.items(), key=lambda each: -each[1]):
        if filesystem.glob(f"{folder}/runs/{key}/checkpoint_*") and key == key_on(version):
            return version
    return published
