"""Promotion and rollback of versions of the registered model, with author and reason."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from imagerag.errors import UserError
from imagerag.registry.versions import (
    CHAMPION,
    PREVIOUS,
    TAG,
    THE_GATE,
    VersionInfo,
    aliases_of,
    check_signed,
    find_version,
    reading_registry,
    versions_in,
    writing_registry,
)
from imagerag.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ROLLED_BACK_TAG = f"{TAG}rolled_back_by"


def rolled_back(settings: Settings, training: str) -> str:
    """Return who rolled back a training's weights and why; empty if nobody did, or if a person promoted them since.

    Raises:
        UserError: if MLflow can't be used.
    """
    with reading_registry(settings) as client:
        return _rolled_back(client, settings.model_name, training)


def champion_version(settings: Settings) -> int | None:
    """Return the version of the current champion; None if there is none.

    Raises:
        UserError: if MLflow can't be used.
    """
    with reading_registry(settings) as client:
        return aliases_of(client, settings.model_name).get(CHAMPION)


def promote(
    settings: Settings,
    version: int,
    *,
    reason: str,
    author: str,
    over: int | None = None,
    tags: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Make a version `champion`, and the current champion `previous`. If it is the champion already, only tag it.

    The gate can't promote over a champion that it did not compare the version with, such as one that a person promoted
    in the meantime. After a person rolled back a training's weights, with any index, the gate can't promote them until
    a person does.

    Args:
        settings: location of MLflow.
        version: number of the version.
        reason: reason for the promotion.
        author: name of the person, or `THE_GATE`.
        over: the champion that the gate compared the version with; None if there was none. Ignored for a person.
        tags: tags to add to the version.

    Raises:
        UserError: if there is no such version, it was not registered by this package, the reason is empty, or the gate
            promotes over another champion, or weights that a person rolled back.
    """
    _check_reason(reason)
    name = settings.model_name
    with writing_registry(settings) as client:
        info = find_version(client, name, str(version))
        check_signed(info)
        champion = aliases_of(client, name).get(CHAMPION)
        if author != THE_GATE:
            _forget_rollbacks(client, name, info.pinned("training"))
        elif champion == version:
            return
        else:
            _check_gate(client, info, champion, over)
        _tag(client, name, version, {**tags, f"{TAG}promoted_by": author, f"{TAG}reason": reason})
        if champion == version:
            return
        if champion is not None:
            client.set_registered_model_alias(name, PREVIOUS, str(champion))
        client.set_registered_model_alias(name, CHAMPION, str(version))


def rollback(settings: Settings, *, reason: str, author: str) -> int:
    """Make the version `previous` the champion again, remove the alias `previous`, and return the version.

    Raises:
        UserError: if there is no previous champion, or the reason is empty.
    """
    _check_reason(reason)
    name = settings.model_name
    with writing_registry(settings) as client:
        aliases = aliases_of(client, name)
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if champion is None or previous is None or previous == champion:
            now = "there is no champion" if champion is None else f"version {champion} is the champion"
            raise UserError(f"{name} has no previous champion to go back to; {now}. `imagerag promote` makes one")
        _tag(client, name, champion, {_ROLLED_BACK_TAG: author, f"{TAG}rollback_reason": reason})
        client.set_registered_model_alias(name, CHAMPION, str(previous))
        # Without `previous`, a second rollback in a panic can't undo the first.
        client.delete_registered_model_alias(name, PREVIOUS)
        return previous


def _check_gate(client: "MlflowClient", info: VersionInfo, champion: int | None, over: int | None) -> None:
    """Raise a `UserError` if the gate may not promote a version."""
    if by := _rolled_back(client, info.name, info.pinned("training")):
        raise UserError(f"{by}. Only a person promotes it again: `imagerag promote {info.version} --reason ...`")
    if champion != over:
        now, before = (f"version {each}" if each is not None else "none" for each in (champion, over))
        raise UserError(
            f"the champion of {info.name} is {now}, and version {info.version} was compared with {before}: evaluate it "
            "again, or promote it by hand"
        )


def _check_reason(reason: str) -> None:
    if not reason.strip():
        raise UserError("say why, for those who look at it later: the reason is empty")


def _rolled_back(client: "MlflowClient", name: str, training: str) -> str:
    for info in versions_in(client, name):
        if info.pinned("training") == training and (person := info.tags.get(_ROLLED_BACK_TAG)):
            return f"{person} rolled back version {info.version}: {info.pinned('rollback_reason')}"
    return ""


def _forget_rollbacks(client: "MlflowClient", name: str, training: str) -> None:
    """Let the gate promote a training's weights again; the tags with the reasons of its rollbacks stay."""
    for info in versions_in(client, name):
        if info.pinned("training") == training and _ROLLED_BACK_TAG in info.tags:
            client.delete_model_version_tag(name, str(info.version), _ROLLED_BACK_TAG)


def _tag(client: "MlflowClient", name: str, version: int, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(name, str(version), key, value)
