"""The model card, which MLflow shows as markdown."""

from dataclasses import replace

from imagerag.plain import in_markdown
from imagerag.registry.card import model_card
from imagerag.registry.package import Manifest

HOSTILE = "![x](https://evil.example/beacon.png) | <b>"


MANIFEST = Manifest(
    base_id="tiny", base_revision=None, base_digest="a" * 64, encoder_id="tiny", encoder_digest="b" * 64,
    index_uri="/index", index_name="mine", index_version=1, index_created_at="", portable=False,
    features_digest="c" * 64, training="first", run_id="d" * 32, packages={}, files={},
)  # fmt: skip


def test_what_lists_say_is_no_markdown_in_a_card() -> None:
    card = model_card(MANIFEST, {(HOSTILE, "CC0"): 3, ("a.example", HOSTILE): 2}, "", has_grid=False)
    said = in_markdown(HOSTILE)
    assert f"| {said} | CC0 | 3 |" in card
    assert rf"| a\.example | {said} | 2 |" in card
    assert "evil.example" not in card


def test_sources_beyond_thirty_are_counted_together() -> None:
    sources = {(f"shop {number}", "CC0"): 100 - number for number in range(32)}
    card = model_card(MANIFEST, sources, "", has_grid=False)
    assert "| shop 29 | CC0 | 71 |" in card
    assert "| others | various | 139 |" in card
    assert "shop 30" not in card
    assert "others" not in model_card(MANIFEST, dict(list(sources.items())[:30]), "", has_grid=False)


def test_a_base_model_of_the_hub_is_named_with_its_commit() -> None:
    """As `load_base` takes it, which then loads that commit, whatever the hub has now."""
    manifest = replace(MANIFEST, base_id="stabilityai/sd-turbo", base_revision="e" * 40)
    assert f"base model: `stabilityai/sd-turbo@{'e' * 40}`" in model_card(manifest, {}, "", has_grid=False)
