"""ImageRAGTurbo: one-step text-to-image generation that knows your images (arXiv 2602.12640).

>>> from imagerag import ImageRAGTurboPipeline, load_base
>>> pipeline = ImageRAGTurboPipeline.from_base(load_base("tiny", "cpu"))
>>> pipeline.set_progress_bar_config(disable=True)
>>> pipeline("a red mug").images[0].size
(128, 128)

It is a diffusers pipeline, which also takes images as references:

>>> from PIL import Image
>>> mug = Image.new("RGB", (200, 300), "red")
>>> made = pipeline("a red mug", reference_images=mug, w=0.1)
>>> made.references[0][0].caption
'a red mug'

`pipeline.use_index(".imagerag/index", "catalogue")` makes it retrieve references from an index that `imagerag
ingest` and `imagerag features` made. The public names are in `__all__`.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from imagerag import _torchvision

if TYPE_CHECKING:
    from imagerag.base.model import load_base
    from imagerag.embedding.encoder import load_encoder
    from imagerag.errors import UserError
    from imagerag.generation.pipeline import ImageRAGTurboPipeline, ImageRAGTurboXLPipeline
    from imagerag.hspace.adapter import HSpaceAdapter
    from imagerag.retrieval.search import Retriever

__all__ = [
    "HSpaceAdapter",
    "ImageRAGTurboPipeline",
    "ImageRAGTurboXLPipeline",
    "Retriever",
    "UserError",
    "load_base",
    "load_encoder",
]
_MODULES = {
    "HSpaceAdapter": "hspace.adapter",
    "ImageRAGTurboPipeline": "generation.pipeline",
    "ImageRAGTurboXLPipeline": "generation.pipeline",
    "Retriever": "retrieval.search",
    "UserError": "errors",
    "load_base": "base.model",
    "load_encoder": "embedding.encoder",
}

_torchvision.install()
# Lance reads this when it is imported. It would warn of every partition to which a few new rows add nothing.
os.environ.setdefault("LANCE_LOG", "warn,lance::index::vector::builder=error")


def __getattr__(name: str) -> Any:
    """Import public names lazily, because the command line does not need most of them."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
