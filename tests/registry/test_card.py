"""The model card, which MLflow shows as markdown."""

from imagerag.plain import in_markdown
from imagerag.registry.card import model_card
from imagerag.registry.package import Manifest

HOSTILE = "![x](https://evil.example/beacon.png) | <b>"


def test_what_lists_say_is_no_markdown_in_a_card() -> None:
    manifest = Manifest(
        base_id="tiny", base_revision=None, base_digest="a" * 64, encoder_id="tiny", encoder_digest="b" * 64,
        index_uri="/index", index_name="mine", index_version=1, index_created_at="", portable=False,
        features_digest="c" * 64, training="first", run_id="d" * 32, packages={}, files={},
    )  # fmt: skip
    card = model_card(manifest, {(HOSTILE, "CC0"): 3, ("a.example", HOSTILE): 2}, "", has_grid=False)
    said = in_markdown(HOSTILE)
    assert f"| {said} | CC0 | 3 |" in card
    assert rf"| a\.example | {said} | 2 |" in card
    assert "evil.example" not in card
