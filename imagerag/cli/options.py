"""Options of the commands that run a flow, made from the model of the flow's parameters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import typer
from typer.core import TyperCommand
from typer.main import get_command

from imagerag.cli.run import FlowName, merged, parameters_of, read_parameters
from imagerag.limits import MAX_SEED

_NAMES = {
    "columns.url": "url-column",
    "columns.caption": "caption-column",
    "download.allowed_hosts": "allow-host",
    "publish.max_shrink": "max-shrink",
    "features.base": "base",
    "features.fit": "fit",
    "data.base": "base",
    "data.teacher": "teacher",
    "data.held_out": "held-out",
    "training.steps": "steps",
    "training.seed": "seed",
    "evaluation.prompts": "prompts",
    "evaluation.num_prompts": "num-prompts",
    "evaluation.seed": "seed",
    "gate.metric": "metric",
    "embed.num_workers": "num-workers",
    "features.num_workers": "num-workers",
    "workers.num_workers": "num-workers",
    "evaluation.num_workers": "num-workers",
}
"""Short names of options; one that several parameters share sets all of them. Other parameters go by their path."""
_METAVARS = {"url_list": "IMAGES"}
_KINDS = {"boolean": bool, "integer": int, "number": float, "string": str}

Schema = Mapping[str, Any]
"""JSON schema of a model or field, which the form in Prefect's UI is made from as well."""


class FlowCommand(TyperCommand):
    """A command, named like its flow, with an option for each of the flow's parameters that its function doesn't have.

    The function finds the given parameters, from the file `--parameters` and from options, in its context's `obj`.
    Options are made when the command is used, because models take longer to import than `imagerag --help` may.
    """

    _paths: Mapping[str, list[str]] = {}
    """For each option, the parameters that it sets, by their paths in the model."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options and arguments: the function's, the flow's parameters, and `--parameters`."""
        if not self._paths:
            schema = parameters_of(cast("FlowName", self.name)).model_json_schema()
            own = {param.name for param in self.params}
            fields = {path: field for path, field in _fields(schema, schema["$defs"]) if path not in own}
            self._paths = _by_option(fields)
            self.params += _params(
                _declared(name, [fields[path] for path in paths]) for name, paths in self._paths.items()
            )
        return super().get_params(ctx)

    def invoke(self, ctx: Any) -> Any:
        """Collect the parameters in the context, and call the function."""
        file = ctx.params.pop("parameters")
        ctx.obj = read_parameters(Path(file)) if file else {}  # older versions of Typer give a string
        for name, paths in self._paths.items():
            value = ctx.params.pop(_identifier(name))
            for path in paths if value not in (None, (), []) else ():
                ctx.obj = merged(ctx.obj, _nested(path, value))
        return super().invoke(ctx)


def _fields(
    model: Schema, models: Schema, prefix: str = "", group: Schema = MappingProxyType({})
) -> Iterator[tuple[str, Schema]]:
    """Yield the fields of a model, which is the whole or a group of values, by path; single values come first."""
    for name, field in sorted(model["properties"].items(), key=lambda each: "$ref" in each[1]):
        default = group.get("default", {}).get(name, field.get("default"))
        about = {"default": default, "group": group.get("group", field["description"].rstrip("."))}
        if "$ref" in field:
            yield from _fields(models[field["$ref"].rpartition("/")[2]], models, f"{prefix}{name}.", about)
        else:
            yield prefix + name, {**field, **about, "required": name in model.get("required", ())}


def _by_option(paths: Iterable[str]) -> Mapping[str, list[str]]:
    """Return the paths of each option: options with short names and those of single values at the top come first."""
    options: dict[str, list[str]] = {}
    for path in paths:
        options.setdefault(_NAMES.get(path, path), []).append(path)
    return dict(sorted(options.items(), key=lambda each: "." in each[0]))


def _declared(name: str, fields: Sequence[Schema]) -> Parameter:
    """Return an option, or the argument for a required parameter, as Typer reads it from a function's signature."""
    field, descriptions = fields[0], dict.fromkeys(each["description"] for each in fields)
    is_many, option = field["type"] == "array", f"--{name.replace('_', '-')}"
    value = field["items"] if is_many else field
    kind: Any = _KINDS[value["type"]]
    choices = [each for each in value.get("enum", ()) if each is not None]
    about: dict[str, Any] = {
        "help": " ".join([*descriptions, *_default(field["default"])]),
        "metavar": f"[{'|'.join(choices)}]" if choices else _METAVARS.get(name),
        "min": value.get("minimum"),
        "max": value["maximum"] if value.get("maximum", MAX_SEED) < MAX_SEED else None,
    }
    if field["required"]:
        return Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=typer.Argument(**about))
    if kind is bool and field["default"]:
        option += f"/--no-{option.removeprefix('--')}"
    return Parameter(
        _identifier(name),
        Parameter.KEYWORD_ONLY,
        annotation=(list[kind] if is_many else kind) | None,
        default=typer.Option(
            None, option, hidden="." in name, rich_help_panel=field["group"] if "." in name else None, **about
        ),
    )


def _default(value: Any) -> list[str]:
    """Return a sentence with a default as it is written on the command line; none if there is nothing to write."""
    values = value if isinstance(value, list) else [] if value is None or value is False else [value]
    return [f"Default: {', '.join('on' if each is True else str(each) for each in values)}."] if values else []


def _params(declared: Iterable[Parameter]) -> list[Any]:
    """Return what Typer makes of a function with these parameters, `--parameters` and `--help-all`."""
    of_file = typer.Option(None, help="JSON file with any of the flow's parameters, as the Prefect UI shows them.")
    help_all = typer.Option(
        False, "--help-all", is_eager=True, expose_value=False, callback=_show_all,
        help="Show the options of all parameters and exit.",
    )  # fmt: skip

    def command() -> None: ...

    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            *declared,
            Parameter("parameters", Parameter.KEYWORD_ONLY, annotation=Path | None, default=of_file),
            Parameter("help_all", Parameter.KEYWORD_ONLY, annotation=bool, default=help_all),
        ]
    )
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return get_command(app).params


def _show_all(context: typer.Context, is_given: bool) -> None:
    if is_given:
        params: list[Any] = context.command.params
        for param in params:
            param.hidden = False
        typer.echo(context.get_help())
        raise typer.Exit


def _identifier(name: str) -> str:
    return name.replace(".", "__").replace("-", "_")


def _nested(path: str, value: Any) -> dict[str, Any]:
    """Return `{"training": {"steps": value}}` for `training.steps`."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return cast("dict[str, Any]", value)
