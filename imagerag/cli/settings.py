"""`imagerag settings`: every setting with its value and source."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

_ENGINES = ("AWS_", "MLFLOW_", "PREFECT_", "RAY_")
_SECRET = re.compile(r"(SECRET|PASSWORD|TOKEN|KEY|AUTH_STRING|HEADERS|CREDENTIALS)(?!.*_(PATH|FILE|URI)$)")
_ENVIRONMENT, _FILE, _DEFAULT = "environment", ".env", "default"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An environment variable, with credentials in its value masked."""

    variable: str
    value: str | None
    source: str


def settings(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """Show every setting with its value and source, and the engines' variables that are set; credentials are masked."""
    from imagerag.settings import unknown_variables

    shown = [*_own(), *_of_engines()]
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in shown], indent=1))
    else:
        from rich.table import Table

        from imagerag.cli.terminal import PlainConsole

        table = Table("variable", "value", "from")
        for each in shown:
            table.add_row(each.variable, "" if each.value is None else each.value, each.source)
        PlainConsole().print(table)
    for name, source, _ in unknown_variables():
        typer.echo(f"{name} ({source}) is not read: there is no such setting", err=True)


def load_environment() -> None:
    """Load the engines' variables from `.env`; variables that are set in the environment take precedence."""
    from dotenv import dotenv_values

    for name, value in dotenv_values(_FILE).items():
        if name.startswith(_ENGINES) and value:
            os.environ.setdefault(name, value)


def _own() -> Iterator[Setting]:
    from imagerag.settings import Settings, masked, sources, variable_of

    found = sources()
    for name, value in Settings():
        source = found.get(name, _DEFAULT)
        text = json.dumps(value) if isinstance(value, dict) else None if value is None else str(value)
        yield Setting(variable=variable_of(name), value=None if text is None else masked(text), source=source)


def _of_engines() -> Iterator[Setting]:
    from dotenv import dotenv_values

    from imagerag.settings import masked

    in_file = dotenv_values(_FILE)
    for name in sorted(each for each in os.environ if each.startswith(_ENGINES)):
        value = os.environ[name]
        source = _FILE if in_file.get(name) == value else _ENVIRONMENT
        yield Setting(variable=name, value="***" if _SECRET.search(name) else masked(value), source=source)
