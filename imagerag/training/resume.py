"""Which version of its index a training learns from: the published one, unless one was begun on an earlier one.

The version is a part of a training's name, and a list is re-indexed every night: without this, half a week of training
would be begun anew on the next call.
"""

import fsspec

from imagerag.generation.finetuned import MANIFEST
from imagerag.retrieval.pins import TRAINING, pins
from imagerag.retrieval.publish import require_published
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training.config import FinetuneConfig, SynthesizeConfig
from imagerag.training.examples import Examples
from imagerag.training.job import key_of
from imagerag.training.synthesize import describe


def version_to_learn_from(
    name: str, data: SynthesizeConfig, training: FinetuneConfig, settings: Settings, *, anew: bool = False
) -> int:
    """Return the version of the corpus's index that a training has to use.

    That is the one of a training with the same parameters that has a checkpoint, is not finished, and pins its version;
    else, and with `anew`, the published one.

    Raises:
        UserError: if nothing was published, or a loss needs a network that is not there.
    """
    from imagerag.training.perceptual import check_perceptual

    store = Store(settings.index_uri, name)
    published = require_published(store)
    pinned = pins(store).items()
    begun = {label.removeprefix(TRAINING): version for label, version in pinned if label.startswith(TRAINING)}
    if anew or not begun:
        return published
    if training.losses.perceptual:
        check_perceptual(training.perceptual_network)  # a training's name depends on it

    def key_on(version: int) -> str:
        retriever = Retriever(store.uri, name, version=version)
        return key_of(describe(Examples(retriever, data, settings.training_of(name))), training)

    filesystem, folder = fsspec.url_to_fs(settings.training_of(name))
    of_published = key_on(published)
    if of_published in begun or filesystem.exists(f"{folder}/finetuned/{of_published}/{MANIFEST}"):
        return published
    for key, version in sorted(begun.items(), key=lambda each: -each[1]):
        if filesystem.glob(f"{folder}/runs/{key}/checkpoint_*") and key == key_on(version):
            return version
    return published
