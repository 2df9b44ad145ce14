"""Base class of all configurations: validated when constructed, and shown as forms in the Prefect UI."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic.fields import ComputedFieldInfo, FieldInfo

from imagerag.errors import UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_ACRONYMS = {"url": "URL", "ema": "EMA", "lora": "LoRA", "clip": "CLIP", "sha256": "SHA-256", "tifa": "TIFA"}


def _title(name: str, _: FieldInfo | ComputedFieldInfo) -> str:
    """Return a field's label: `timeout_s` is "Timeout (s)", `url_list` is "URL list"."""
    words = re.sub(r"_s$", " (s)", name).replace("_", " ").split(" ")
    first, *others = (_ACRONYMS.get(word, word) for word in words)
    return " ".join([first[0].upper() + first[1:], *others])


def _plain_optionals(schema: dict[str, Any]) -> None:
    """Show an optional value as a field that may be left empty; a form would otherwise ask for its type first."""
    for field in schema.get("properties", {}).values():
        some = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
        if len(some) == 1 and len(field["anyOf"]) == 2 and field.get("default") is None:
            del field["anyOf"], field["default"]
            field.update(some[0])
            if "enum" in field:
                field["enum"] = [*field["enum"], None]  # the form sends null for an empty field


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).absolute())


Place = Annotated[str, AfterValidator(_absolute)]
"""URI or path of a file or folder; a relative path is made absolute, because it becomes part of a job's identity."""


class Config(BaseModel):
    """Base class of all configurations and flow parameters."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", field_title_generator=_title, json_schema_extra=_plain_optionals
    )


C = TypeVar("C", bound=Config)


def validated(model: type[C], values: Mapping[str, Any]) -> C:
    """Return a `model` of `values`.

    Raises:
        UserError: if a value is invalid; the message names the field, the rule and the value.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError("; ".join(map(_fault, error.errors()))) from error


def _fault(error: "ErrorDetails") -> str:
    """Describe which parameter is invalid, why, and its value."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}; got {error['input']!r}"
