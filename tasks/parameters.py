"""Parameters of flows: declared once, as a pydantic model, and passed to Prefect as keywords, for a flat form."""

import json
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, Signature, getfile
from typing import Annotated, Any, TypeVar

from prefect import Flow, flow
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.utilities.hashing import file_hash
from pydantic import Field, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import MISSING

from imagerag.config import Config, validated
from imagerag.errors import UserError
from imagerag.settings import DEFAULT_NAME
from tasks.dashboard import write_dashboard
from tasks.policy import hide_user_tracebacks

C = TypeVar("C", bound=Config)
R = TypeVar("R")

_WRAPPED, _VARIABLE = "__prefect_kind", "workspace_variable"


def flow_of(model: type[C]) -> Callable[[Callable[[C], R]], Flow[..., R]]:
    """Return a decorator: it turns a function of a `model` into a Prefect flow with the model's fields as keywords.

    Prefect derives a flow's form from its function's signature, which is built from the model here. Only the model
    validates a run's parameters, so that an error is one line that names the parameter, its constraint and the value.
    """

    def decorate(function: Callable[[C], R]) -> Flow[..., R]:
        name = function.__name__

        @wraps(function)
        def run(**values: Any) -> R:
            hide_user_tracebacks()
            given = {key: value for key, value in unwrapped(values).items() if value is not MISSING}
            parameters = validated(model, given)
            _tag(str(given.get("name", DEFAULT_NAME)))
            return function(parameters)

        run.__signature__ = _signature(model)  # type: ignore[attr-defined]
        return flow(
            name=name,
            version=file_hash(getfile(function)),
            flow_run_name=f"{name} {{name}}",
            validate_parameters=False,
            on_completion=[write_dashboard],
            on_failure=[write_dashboard],
        )(run)

    return decorate


def _tag(name: str) -> None:
    """Tag the running flow with its corpus, so that the UI can filter runs by corpus."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    with get_client(sync_client=True) as client:
        client.update_flow_run(context.flow_run.id, tags={*context.flow_run.tags, f"corpus:{name}"})


def unwrapped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters without the wrappers that Prefect's UI puts around JSON values and variables.

    Prefect's server unwraps them for runs that people start, but not for scheduled runs.

    Raises:
        UserError: if a wrapped value can't be read.
    """
    text = json.dumps(values, default=str)
    if _WRAPPED not in text:
        return dict(values)
    from prefect.utilities.schema_tools.hydration import HydrationContext, HydrationError, hydrate

    variables = _variables() if _VARIABLE in text else {}
    context = HydrationContext(workspace_variables=variables, render_workspace_variables=True, raise_on_error=True)
    try:
        return hydrate(dict(values), context)
    except HydrationError as error:
        raise UserError(f"a parameter can't be read: {error}") from error


def _variables() -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        return {variable.name: variable.value for variable in client.read_variables()}


def _signature(model: type[Config]) -> Signature:
    """Return the keyword parameters for a model's form: required values first, groups of values last."""
    shown = model.model_json_schema()["properties"]
    parameters = [_parameter(name, field, shown[name]) for name, field in model.model_fields.items()]
    return Signature(
        sorted(
            parameters, key=lambda each: ("$ref" in shown[each.name], not model.model_fields[each.name].is_required())
        )
    )


def _parameter(name: str, field: FieldInfo, shown: dict[str, Any]) -> Parameter:
    # Prefect labels a parameter with its name, unless the extra schema has a title.
    extra = {"title": shown["title"]}
    is_group = "$ref" in shown
    kind = field.annotation if is_group else Annotated[Any, WithJsonSchema(shown)]
    default = ... if field.is_required() else MISSING if field.default is None else field.default
    described = Field(default=default, description=field.description, json_schema_extra=extra)
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=described)
