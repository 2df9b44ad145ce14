"""Let torchvision import next to a CPU build of torch.

torchvision's wheels on PyPI are built for CUDA. With a CPU-only torch, their compiled operators do not load, and
`import torchvision` (and so open_clip, timm and parts of transformers) fails with "operator torchvision::nms does not
exist". Declaring the schemas of `nms` and `qnms` is enough for code that does not call them. The hook in this module
does so when torchvision is first imported, and only if torch is a CPU build and torchvision is not: CUDA machines are
not affected, and `import imagerag` does not import torch. To import torchvision without or before `imagerag`, install
its CPU build from PyTorch's package index.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Hook(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.origin is not None and is_misfit():
            _declare_missing_operators(Path(spec.origin).parent / "_C.so")
        return spec


def is_misfit() -> bool:
    """Return whether torch is a CPU build and torchvision is not, so that torchvision needs the hook."""
    return version("torch").endswith("+cpu") and not version("torchvision").endswith("+cpu")


def _declare_missing_operators(library: Path) -> None:
    import torch

    try:
        torch.ops.load_library(library)
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", _NMS)


def install() -> None:
    """Install the hook, once per process."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())
