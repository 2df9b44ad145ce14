"""Which corpus is meant."""

from typing import Annotated

import typer

from imagerag.errors import UserError

DEFAULT = "images"

NameOption = Annotated[str | None, typer.Option(help="The corpus; not given, the only one that there is.")]


def corpus_name(name: str | None) -> str:
    """Return the name of an indexed corpus: the one that is given, else of the only one that there is.

    Raises:
        UserError: if there are several to choose from, or `name` can't be a name.
    """
    from imagerag.retrieval.store import list_stores
    from imagerag.settings import Settings, check_name

    if name is not None:
        return check_name(name)
    names = [store.name for store in list_stores(Settings().index_uri)]
    if len(names) > 1 and DEFAULT not in names:
        raise UserError(f"there are several corpora; choose one by --name: {', '.join(names)}")
    return names[0] if len(names) == 1 else DEFAULT
