"""The forms that the Prefect UI makes of the flows' parameters, and what its server refuses."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.schema_tools.validation import validate

from flows.ingest import ingest

FLOWS = sorted(path.stem for path in (Path(__file__).parents[2] / "flows").glob("[a-z]*.py"))


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for model, definition in schema["definitions"].items():
        yield from ((f"{model}.{name}", field) for name, field in definition["properties"].items())


@pytest.mark.parametrize("flow", FLOWS)
def test_every_field_has_a_label_and_a_help_and_can_be_filled_at_once(flow: str) -> None:
    schema = getattr(import_module(f"flows.{flow}"), flow).parameters.model_dump_for_openapi()
    named = {name: field for name, field in fields(schema) if "$ref" not in field}
    assert len(named) > 5
    assert {name for name, field in named.items() if not field.get("description")} == set()
    assert {name for name, field in named.items() if "anyOf" in field} == set(), "the form would ask for a type first"
    titles = {field["title"] for field in named.values()}
    assert {title for title in titles if title.endswith(" S") or "Url" in title} == set()


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({}, []),
        ({"embed": {"device": "cpu", "dtype": None}, "columns": {"url": None, "caption": "text"}}, []),
        ({"embed": {"num_workers": 0}}, ["0 is less than the minimum of 1"]),
        ({"embed": {"device": "tpu"}}, ["'tpu' is not one of ['cpu', 'cuda', None]"]),
        ({"download": {"timeout_s": 0}}, ["0 is less than or equal to the minimum of 0"]),
        ({"downloads": {}}, ["Additional properties are not allowed ('downloads' was unexpected)"]),
    ],
)
def test_the_server_refuses_what_the_flow_would(given: dict[str, Any], refused: list[str]) -> None:
    schema = ingest.parameters.model_dump_for_openapi()
    errors = validate({"parameters": {"url_list": "list.csv"} | given}, schema, allow_none_with_default=True)
    assert [error.message for error in errors] == refused
