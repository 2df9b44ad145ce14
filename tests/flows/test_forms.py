"""The forms that the Prefect UI makes of the flows' parameters, and what its server and the flows refuse."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from flows.ingest import ingest
from flows.parameters import PARAMETERS, CorpusParameters
from imagerag.config import validated
from imagerag.errors import UserError
from tasks.parameters import unwrapped

FLOWS = sorted(PARAMETERS)


def test_every_flow_has_its_parameters() -> None:
    files = {path.stem for path in (Path(__file__).parents[2] / "flows").glob("[a-z]*.py")}
    assert files == {*FLOWS, "parameters"}


def form(flow: str) -> dict[str, Any]:
    """What the server is given when a flow is deployed."""
    return parameter_schema(getattr(import_module(f"flows.{flow}"), flow)).model_dump_for_openapi()


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from schema["properties"].items()
    for model, definition in schema["definitions"].items():
        yield from ((f"{model}.{name}", field) for name, field in definition["properties"].items())


@pytest.mark.parametrize("flow", FLOWS)
def test_every_field_has_a_label_and_a_help_and_can_be_filled_at_once(flow: str) -> None:
    named = {name: field for name, field in fields(form(flow)) if "$ref" not in field}
    assert len(named) > 5
    assert {name for name, field in named.items() if not field.get("description")} == set()
    assert {name for name, field in named.items() if "anyOf" in field} == set(), "the form would ask for a type first"
    titles = {field["title"] for field in named.values()}
    assert {title for title in titles if title.endswith(" S") or "Url" in title} == set()


@pytest.mark.parametrize("flow", FLOWS)
def test_a_form_is_flat_and_begins_with_single_values(flow: str) -> None:
    properties = form(flow)["properties"]
    shown = sorted(properties, key=lambda name: properties[name]["position"])
    assert "name" in shown[:2]
    is_group = ["$ref" in properties[name] for name in shown]
    assert is_group == sorted(is_group)
    assert {properties[name]["title"] for name in shown} & set(shown) == set(), "labels are words"


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({}, []),
        ({"captions": None, "name": "mine"}, []),
        ({"embed": {"device": "cpu", "dtype": None}, "columns": {"url": None, "caption": "text"}}, []),
        ({"embed": {"num_workers": 0}}, ["0 is less than the minimum of 1"]),
        ({"embed": {"device": "tpu"}}, ["'tpu' is not one of ['cpu', 'cuda', None]"]),
        ({"download": {"timeout_s": 0}}, ["0 is less than or equal to the minimum of 0"]),
        ({"download": {"retry": 1}}, ["Additional properties are not allowed ('retry' was unexpected)"]),
        ({"url_list": None}, ["None is not of type 'string'"]),
    ],
)
def test_the_server_refuses_what_the_flow_would(given: dict[str, Any], refused: list[str]) -> None:
    errors = validate({"url_list": "list.csv"} | given, form("ingest"))
    assert [error.message for error in errors] == refused


def test_a_number_at_the_top_has_its_limits() -> None:
    (error,) = validate({"keep_models": -1}, form("evaluate"))
    assert error.message == "-1 is less than the minimum of 0"


def wrapped(kind: str, value: object) -> dict[str, object]:
    return {"__prefect_kind": kind, "value": value}


def test_what_the_ui_wraps_a_schedules_parameters_in_is_taken_off() -> None:
    plain = {"url_list": "list.csv", "download": {"retries": 2, "allowed_hosts": ["a.example"]}, "refresh": True}
    for sent in (
        plain,
        plain | {"download": wrapped("json", json.dumps(plain["download"]))},
        plain | {"url_list": wrapped("none", "list.csv"), "refresh": wrapped("json", "true")},
        plain | {"download": {"retries": wrapped("json", "2"), "allowed_hosts": [wrapped("none", "a.example")]}},
        plain | {"embed": {"__prefect_kind": "json"}},  # opened as JSON, and left empty
    ):
        assert validated(CorpusParameters, unwrapped(sent)) == validated(CorpusParameters, plain)
    with pytest.raises(UserError, match="a parameter can't be read: Invalid JSON"):
        unwrapped(plain | {"download": wrapped("json", "{retries: 2}")})


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"url_list": wrapped("json", '"list.csv"'), "name": "A b"}, "a corpus name has 1 to 63 characters"),
        ({"name": "mine"}, "url_list: Field required"),
        ({"parameters": {"url_list": "list.csv"}}, "parameters: Extra inputs are not permitted"),
    ],
)
def test_a_run_says_in_one_line_which_parameter_is_wrong(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        ingest.fn(**given)
