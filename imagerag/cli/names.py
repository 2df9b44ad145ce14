"""The options `--name` and `--model-name`, and their defaults."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from imagerag.errors import UserError

NameOption = Annotated[str | None, typer.Option(help="Name of the corpus. Default: the only one, or `images`.")]
ModelNameOption = Annotated[
    str | None,
    typer.Option(help="Registered model in MLflow. Default: IMAGERAG_MODEL_NAME, or `imagerag-turbo`."),
]


def with_name(parameters: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Return a flow's parameters with the corpus that `--name` names, or the default if none is named.

    Raises:
        UserError: as `corpus_name`.
    """
    named = {"name": corpus_name(name)} if name is not None or "name" not in parameters else {}
    return {**parameters, **named}


def corpus_name(name: str | None) -> str:
    """Return `name`, or by default the name of the only indexed corpus; `images` if there are none or several.

    Raises:
        UserError: if `name` is invalid, or there are several corpora and none is named `images`.
    """
    from imagerag.retrieval.store import list_stores
    from imagerag.settings import DEFAULT_NAME, Settings, check_name

    if name is not None:
        return check_name(name)
    names = [store.name for store in list_stores(Settings().index_uri)]
    if len(names) > 1 and DEFAULT_NAME not in names:
        raise UserError(f"there are several corpora; choose one by --name: {', '.join(names)}")
    return names[0] if len(names) == 1 else DEFAULT_NAME
