"""ImageRAGTurbo: one-step text-to-image generation that knows your images (arXiv 2602.12640)."""

from imagerag import _torchvision

_torchvision.install()
