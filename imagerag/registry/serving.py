"""A registered model as MLflow calls it: prompts and parameters in, pictures and where they come from out."""

import base64
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property

from imagerag.errors import UserError
from imagerag.generation.batch import generate
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.generation.sheet import to_png
from imagerag.hspace.fusion import FusionName
from imagerag.limits import check_seeds
from imagerag.registry.model import PACKAGE
from imagerag.registry.package import load

MAX_IMAGES = 64
_REFERENCE = {"id": "string", "caption": "string", "url": "string", "source": "string", "licence": "string",
              "similarity": "double", "weight": "double"}  # fmt: skip

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "image"),
            ColSpec(DataType.long, "seed"),
            ColSpec(Array(Object([Property(name, kind) for name, kind in _REFERENCE.items()])), "references"),
        ]
    ),
    params=ParamSchema(
        [
            ParamSpec("seed", DataType.long, 0),
            ParamSpec("num_images", DataType.long, 1),
            ParamSpec("num_references", DataType.long, None),
            ParamSpec("fusion", DataType.string, "adapter"),
            ParamSpec("scale", DataType.double, None),
            ParamSpec("w", DataType.double, None),
            ParamSpec("steps", DataType.long, 1),
        ]
    ),
)
"""Images are PNGs in base64."""


class ImageRAGTurboModel(PythonModel):  # type: ignore[misc]
    """A pipeline that MLflow loads and serves."""

    def load_context(self, context: Any) -> None:
        """Load the pipeline; errors, and `device` and `dtype` of MLflow's `model_config`, as of `package.load`."""
        config = context.model_config or {}
        self._pipeline = load(Path(context.artifacts[PACKAGE]), config.get("device"), config.get("dtype"))
        # A server calls from several threads, and a scheduler remembers its step.
        self._lock = threading.Lock()

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return the rows of all prompts, prompt by prompt.

        Raises:
            MlflowException: for what is a `UserError` elsewhere, because the server shows the message of no other.
        """
        try:
            with self._lock:
                return make_rows(self._pipeline, model_input["prompt"].tolist(), **params or {})
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


def make_rows(
    pipeline: ImageRAGTurboPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_images: int = 1,
    num_references: int | None = None,
    fusion: FusionName = "adapter",
    scale: float | None = None,
    w: float | None = None,
    steps: int = 1,
) -> list[dict[str, Any]]:
    """Make pictures of prompts, and return for each its `image` (PNG in base64), its `seed` and its `references`.

    Each is made by itself, so that it does not depend, not even in its last digits, on what is asked for with it.

    Args:
        pipeline: what makes them.
        prompts: at least one.
        seed: of the first picture of each prompt; the next ones have the next seeds.
        num_images: of each prompt.
        num_references: of each prompt; by default as many as suit the fusion.
        fusion: how references are used.
        scale: of what the adapter adds; by default the adapter's own.
        w: of the base model in slerp; by default the base model's own.
        steps: of the scheduler.

    Raises:
        UserError: if an argument is out of its bounds, or references can't be had.
    """
    if not 1 <= num_images <= MAX_IMAGES:
        raise UserError(f"num_images must be between 1 and {MAX_IMAGES}; got {num_images}")
    check_seeds(seed, num_images)
    made = generate(
        pipeline,
        prompts,
        range(seed, seed + num_images),
        batch_size=1,
        num_references=num_references,
        fusion=fusion,
        adapter_scale=scale,
        w=w,
        num_inference_steps=steps,
    )
    return [
        {
            "image": base64.b64encode(to_png(each.image)).decode(),
            "seed": each.seed,
            "references": [asdict(row) for row in each.references],
        }
        for each in made
    ]
