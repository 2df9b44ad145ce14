"""MLflow's interface to a registered model: prompts and parameters in, pictures with their references out."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
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
"""Images are base64-encoded PNGs. Parameters are named as in MLflow's own diffusers flavour, where it has them."""
MODEL_CONFIG: Mapping[str, Any] = dict.fromkeys(_LOADING) | WaitingConfig().model_dump()
"""Options of `load_model(..., model_config=...)`; for `mlflow models serve`, as JSON in SERVING_MODEL_CONFIG."""
_REQUIRED = {spec.name for spec in SIGNATURE.params.params if spec.default is not None}
_RENAMED = {"steps": "num_inference_steps"}
"""Old names of parameters, in versions that earlier releases registered."""


class ImageRAGTurboModel(PythonModel):  # type: ignore[misc]
    """A pipeline that MLflow loads and serves."""

    def load_context(self, context: Any) -> None:
        """Load the pipeline and generate a picture, so that a server that reports healthy is tested and warmed up.

        In MLflow's `model_config`, `device` and `dtype` are arguments of `package.load`, whose errors apply; other
        options are those of `WaitingConfig`.
        """
        config = {name: value for name, value in (context.model_config or {}).items() if value is not None}
        loading = {name: config.pop(name, None) for name in _LOADING}
        waiting = WaitingConfig.model_validate(config)
        pipeline = load(Path(context.artifacts[PACKAGE]), **loading)
        if waiting.batch_size > 1:  # convolutions are then faster, and as in any batch the last digits are others
            for module in (pipeline.unet, pipeline.vae):
                module.to(memory_format=torch.channels_last)
        self._waiting = Waiting(pipeline, waiting)
        make_rows(self._waiting, ["a picture to warm up by"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return the rows of all prompts, in the order of the prompts.

        Raises:
            MlflowException: instead of a `UserError`, because MLflow's server shows only its messages.
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
    """Return the prompts of MLflow's input frame, whose only row is a list if the input was a dict of lists."""
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
    """Generate pictures, and return the `image` (base64-encoded PNG), `seed` and `references` of each.

    By default pictures are generated one by one, so that a picture is bit-for-bit independent of other prompts and
    requests. The PNG's text chunk `imagerag` has the model, the arguments, and the references with their licences; its
    XMP says that the picture is generated.

    Args:
        waiting: queue of the pipeline.
        prompts: one or more prompts.
        seed: seed of the first picture of each prompt; further pictures have the following seeds.
        num_images: number of pictures per prompt.
        num_references: number of references per prompt; by default the fusion's default.
        fusion: fusion of references.
        scale: scale of the adapter's contribution; by default the adapter's own.
        w: slerp weight, -1 to 1: 1 is the base model, 0 the reference; by default the base model's own.
        num_inference_steps: number of scheduler steps.
        guidance_scale: scale of classifier-free guidance; off at 1 and below, and by default.
        negative_prompt: negative prompt of the guidance, which has to be on.
        height: height in pixels, given together with `width`; by default the base model's own.
        width: width in pixels.

    Raises:
        UserError: if an argument is out of bounds or has no effect, or references are unavailable.
        BusyError: if too many pictures wait, or these have waited too long.
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
    if (height is None) != (width is None):  # diffusers would ignore a single one
        raise UserError(f"height and width are given together; got {height} and {width}")
    _check_effects(fusion, num_references=num_references or None, scale=scale, w=w)
    if negative_prompt and not waiting.pipeline.is_guided(guidance_scale):
        raise UserError(f"negative_prompt has no effect without guidance; got guidance_scale {guidance_scale}")
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


def _check_effects(fusion: str, **given: float | None) -> None:
    """Check that the fusion has the given parameters, because a client sees no warning, and PNGs would record them.

    Raises:
        UserError: if it does not have one.
    """
    own = {"adapter": ("num_references", "scale"), "slerp": ("num_references", "w"), "none": ()}.get(fusion, given)
    for name, value in given.items():
        if value is not None and name not in own:
            raise UserError(f"{name} has no effect with fusion {fusion!r}; got {value}")
