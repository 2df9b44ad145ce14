"""Promotion and rollback by people and by the gate."""

import pytest

from imagerag.errors import UserError
from imagerag.registry.promotion import champion_version, promote, rollback, rolled_back
from imagerag.registry.versions import THE_GATE, register, resolve_version
from imagerag.settings import DEFAULT_MODEL_NAME
from tests.registry.conftest import Home
from tests.registry.test_versions import WHY, of_alias, publish_more


def test_promoted_and_rolled_back(home: Home) -> None:
    settings = home.settings
    for name in ("first", "second"):
        register(home.finetuned(name), settings)
    for _ in range(2):
        promote(settings, 1, **WHY)
    assert of_alias(home) == {"candidate": 2, "champion": 1}
    with pytest.raises(UserError, match="no previous champion to go back to; version 1 is the champion"):
        rollback(settings, **WHY)
    for _ in range(2):
        promote(settings, 2, **WHY, tags={"gate": "waived"})
    assert of_alias(home) == {"candidate": 2, "champion": 2, "previous": 1}
    assert resolve_version(settings, "champion").tags["gate"] == "waived"
    with pytest.raises(UserError, match="the reason is empty"):
        rollback(settings, reason=" ", author="somebody")
    assert rollback(settings, reason="too blue", author="somebody") == 1
    assert of_alias(home) == {"candidate": 2, "champion": 1}
    assert resolve_version(settings, "2").tags["imagerag.rollback_reason"] == "too blue"
    with pytest.raises(UserError, match="no previous champion"):
        rollback(settings, **WHY)
    with pytest.raises(UserError, match="the reason is empty"):
        promote(settings, 2, reason=" ", author="somebody")


def test_what_a_person_rolled_back_only_a_person_promotes_again(home: Home) -> None:
    """With whatever index: the same weights are another version on each."""
    settings, gate = home.settings, {"reason": "better", "author": THE_GATE}
    for name, over in (("first", None), ("second", 1)):
        promote(settings, register(home.finetuned(name), settings).version, **gate, over=over)
    assert rolled_back(settings, "second") == ""
    rollback(settings, reason="too dark", author="ada")
    assert rolled_back(settings, "second") == "ada rolled back version 2: too dark"
    assert rolled_back(settings, "first") == ""
    publish_more(home)
    assert register(home.finetuned("second"), settings).version == 3
    for version in (2, 3):
        with pytest.raises(UserError, match=r"ada rolled back version 2: too dark\. Only a person promotes it again"):
            promote(settings, version, **gate, over=1)
    assert of_alias(home)["champion"] == 1
    promote(settings, 3, reason="brighter rows", author="ada")
    assert rolled_back(settings, "second") == ""
    assert resolve_version(settings, "2").tags["imagerag.rollback_reason"] == "too dark"
    promote(settings, 1, **gate, over=3)
    promote(settings, 2, **gate, over=1)
    assert of_alias(home)["champion"] == 2


def test_the_gate_does_not_promote_over_a_champion_that_it_did_not_compare_with(home: Home) -> None:
    """A person promoted it while the evaluation ran."""
    settings, gate = home.settings, {"reason": "better", "author": THE_GATE}
    for name in ("first", "second"):
        register(home.finetuned(name), settings)
    assert champion_version(settings) is None
    promote(settings, 1, reason="the style that we want", author="ada")
    with pytest.raises(UserError, match="is version 1, and version 2 was compared with none: evaluate it again"):
        promote(settings, 2, **gate)
    assert champion_version(settings) == 1
    promote(settings, 2, **gate, over=1)
    assert champion_version(settings) == 2


def test_the_gate_leaves_a_champion_as_a_person_made_it(home: Home) -> None:
    """An evaluation of the champion itself compares it with none."""
    settings = home.settings
    register(home.finetuned("first"), settings)
    promote(settings, 1, reason="the style that we want", author="ada")
    promote(settings, 1, reason="better", author=THE_GATE)
    info = resolve_version(settings, "champion")
    assert (info.tags["imagerag.promoted_by"], info.tags["imagerag.reason"]) == ("ada", "the style that we want")


def test_there_is_nothing_to_go_back_to_after_a_promotion_that_was_killed(home: Home) -> None:
    """It had made the champion `previous`, and made nothing the champion."""
    settings = home.settings
    register(home.finetuned("first"), settings)
    promote(settings, 1, **WHY)
    home.client.set_registered_model_alias(DEFAULT_MODEL_NAME, "previous", "1")
    with pytest.raises(UserError, match="no previous champion to go back to; version 1 is the champion"):
        rollback(settings, reason="too dark", author="ada")
    assert rolled_back(settings, "first") == ""


def test_a_person_confirms_the_champion(home: Home) -> None:
    """The gate may then promote the training's weights again, and the reason is kept."""
    settings = home.settings
    for name in ("first", "second"):
        register(home.finetuned(name), settings)
        promote(settings, 1, **WHY)
    promote(settings, 2, **WHY)
    publish_more(home)
    register(home.finetuned("first"), settings)
    promote(settings, 3, **WHY)
    rollback(settings, reason="too dark", author="ada")
    rollback_of_first = rolled_back(settings, "first")
    assert rollback_of_first
    assert champion_version(settings) == 2
    promote(settings, 1, **WHY)
    promote(settings, 1, reason="good again", author="ada")
    assert rolled_back(settings, "first") == ""
    info = resolve_version(settings, "1")
    assert (info.tags["imagerag.promoted_by"], info.tags["imagerag.reason"]) == ("ada", "good again")
