"""A registered model as MLflow calls it: prompts and parameters in, pictures and where they come from out."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import RESOURCE_EXHAUSTED
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property

from imagerag.errors import UserError
from imagerag.generation.arguments import check_prompts
from imagerag.generation.batch import labelled_png
from imagerag.hspace.fusion import FusionName
from imagerag.limits import check_guidance, check_seeds
from imagerag.registry.model import PACKAGE
from imagerag.registry.package import load
from imagerag.registry.waiting import BusyError, Waiting, WaitingConfig

_LOADING = ("device", "dtype")
_MAX_SIDE, _SIDE_OF_LATENT = 2048, 8
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
            ParamSpec("num_inference_steps", DataType.long, 1),
            ParamSpec("guidance_scale", DataType.double, None),
            ParamSpec("negative_prompt", DataType.string, ""),
            ParamSpec("height", DataType.long, None),
            ParamSpec("width", DataType.long, None),
        ]
    ),
)
"""Images are PNGs in base64. Parameters that MLflow's own flavour of diffusers has, too, have its names."""
MODEL_CONFIG: Mapping[str, Any] = dict.fromkeys(_LOADING) | WaitingConfig().model_dump()
"""What `load_model(..., model_config=...)` may set, and SERVING_MODEL_CONFIG as JSON for `mlflow models serve`."""
_REQUIRED = {spec.name for spec in SIGNATURE.params.params if spec.default is not None}
_RENAMED = {"steps": "num_inference_steps"}
"""Parameters of versions that were registered by earlier releases."""


class ImageRAGTurboModel(PythonModel):  # type: ignore[misc]
    """A pipeline that MLflow loads and serves."""

    def load_context(self, context: Any) -> None:
        """Load the pipeline and make a picture, so that a server that says that it is healthy is, and is warm.

        `device` and `dtype` of MLflow's `model_config`, and errors, are as of `package.load`; the rest is a
        `WaitingConfig`.
        """
        config = {name: value for name, value in (context.model_config or {}).items() if value is not None}
        loading = {name: config.pop(name, None) for name in _LOADING}
        waiting = WaitingConfig.model_validate(config)
        self._waiting = Waiting(load(Path(context.artifacts[PACKAGE]), **loading), waiting)
        make_rows(self._waiting, ["a picture to warm up by"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return the rows of all prompts, prompt by prompt.

        Raises:
            MlflowException: for what is a `UserError` elsewhere, because the server shows the message of no other.
        """
        try:
            named = {_RENAMED.get(name, name): value for name, value in (params or {}).items()}
            unset = sorted(name for name, value in named.items() if value is None and name in _REQUIRED)
            if unset:
                raise UserError(f"{unset[0]} can't be null: leave it out for what it is by default")
            return make_rows(self._waiting, _prompts(model_input), **named)
        except BusyError as error:
            raise MlflowException(f"{error}: ask again later", error_code=RESOURCE_EXHAUSTED) from error
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


def _prompts(frame: pd.DataFrame) -> list[Any]:
    """Return the prompts of what MLflow hands on: of a dict of lists, it makes a frame whose one row is the list."""
    rows = frame["prompt"].tolist()
    return [prompt for row in rows for prompt in (row if isinstance(row, list | np.ndarray) else [row])]


def make_rows(
    waiting: Waiting,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_images: int = 1,
    num_references: int | None = None,
    fusion: FusionName = "adapter",
    scale: float | None = None,
    w: float | None = None,
    num_inference_steps: int = 1,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
) -> list[dict[str, Any]]:
    """Make pictures of prompts, and return for each its `image` (PNG in base64), its `seed` and its `references`.

    By default each is made by itself, so that it does not depend, not even in its last digits, on what is asked for
    with it. The PNG's text `imagerag` says what made it, with its references and their licences.

    Args:
        waiting: what makes them.
        prompts: at least one.
        seed: of the first picture of each prompt; the next ones have the next seeds.
        num_images: of each prompt.
        num_references: of each prompt; by default as many as suit the fusion.
        fusion: how references are used.
        scale: of what the adapter adds; by default the adapter's own.
        w: of the base model in slerp; by default the base model's own.
        num_inference_steps: of the scheduler.
        guidance_scale: of classifier-free guidance; 1 and less mean none, which is the default.
        negative_prompt: what guidance leads away from.
        height: of a picture, in pixels, with `width`; by default the base model's own.
        width: likewise.

    Raises:
        UserError: if an argument is out of its bounds, or references can't be had.
        BusyError: if too much waits.
    """
    most = waiting.config.max_images
    if not 1 <= num_images <= most:
        raise UserError(f"num_images must be between 1 and {most}; got {num_images}")
    if len(prompts) * num_images > most:
        raise UserError(f"a request is of at most {most} pictures; got {len(prompts)} prompts, {num_images} of each")
    check_seeds(seed, num_images)
    check_prompts([*prompts, negative_prompt] if negative_prompt else prompts)
    if guidance_scale is not None:
        check_guidance(guidance_scale)
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side % _SIDE_OF_LATENT or not _SIDE_OF_LATENT <= side <= _MAX_SIDE):
            raise UserError(f"{name} is a multiple of {_SIDE_OF_LATENT} up to {_MAX_SIDE} pixels; got {side}")
    if (height is None) != (width is None):  # which diffusers would ignore
        raise UserError(f"height and width are given together; got {height} and {width}")
    given = {
        "num_references": num_references, "fusion": fusion, "adapter_scale": scale, "w": w,
        "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt or None, "height": height, "width": width,
    }  # fmt: skip
    arguments = {name: value for name, value in given.items() if value is not None}
    made = waiting.make(
        [(prompt, number) for prompt in prompts for number in range(seed, seed + num_images)], arguments
    )
    config = waiting.pipeline.config
    about = {"base": config.base_id, "digest": config.base_digest, "index": config.index_name,
             "index_version": config.index_version, **arguments}  # fmt: skip
    return [
        {
            "image": base64.b64encode(labelled_png(each, about)).decode(),
            "seed": each.seed,
            "references": [asdict(row) for row in each.references],
        }
        for each in made
    ]
