"""The model card of a registered model: contents, results, data sources and limits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from imagerag.plain import in_markdown
from imagerag.registry.package import Manifest

if TYPE_CHECKING:
    from imagerag.retrieval.search import Retriever

CARD, GRID = "README.md", "grid.png"
PICTURE = f"![Pictures of each prompt]({GRID})"
_MAX_SOURCES = 30
_LIMITS = """\
- It makes pictures of what its base model knows and its index shows. Other prompts get the base model's picture.
- A picture can resemble its references closely. Their licences apply: each answer names its references, with licences.
- Sources and licences are what the index was told by those who filled it; nobody checked them.
- Text in pictures, counting and faces are no better than the base model's. Nothing filters prompts or pictures.
- Bit-for-bit repetition holds on one kind of machine with the package versions below."""


def sources_of(retriever: "Retriever") -> Mapping[tuple[str, str], int]:
    """Return the number of rows per source and licence of the index, largest first."""
    rows = retriever.read(["source", "licence"])
    counts = rows.group_by(["source", "licence"]).aggregate([([], "count_all")]).sort_by([("count_all", "descending")])
    return {(each["source"], each["licence"]): each["count_all"] for each in counts.to_pylist()}


def model_card(manifest: Manifest, sources: Mapping[tuple[str, str], int], results: str, *, has_grid: bool) -> str:
    """Return the model card in markdown.

    Args:
        manifest: manifest of the model.
        sources: number of rows per source and licence, as `sources_of` returns it.
        results: evaluation results in markdown, e.g. a table.
        has_grid: whether the card's folder has a picture grid, to embed in the card.
    """
    shown = list(sources.items())[:_MAX_SOURCES]
    rest = sum(sources.values()) - sum(count for _, count in shown)
    rows = [(source or "unknown", licence or "unknown", count) for (source, licence), count in shown]
    rows += [("others", "various", rest)] if rest else []
    where = "a copy lies in this model" if manifest.portable else f"`{manifest.index_uri}`"
    return "\n".join(
        [
            "# ImageRAGTurbo",
            "",
            "One-step text-to-image generation that is shown the nearest rows of an index.",
            "",
            f"- base model: `{manifest.base}`, digest `{manifest.base_digest}`",
            f"- index: `{manifest.index_name}` version {manifest.index_version}, {where}",
            f"- its encoder: `{manifest.encoder_id}`, digest `{manifest.encoder_digest}`",
            f"- training: `{manifest.training}`, MLflow run `{manifest.run_id}`",
            "",
            "## Results",
            "",
            results or "None were given when it was registered.",
            *(["", PICTURE] if has_grid else []),
            "",
            "## Data of the index",
            "",
            "| source | licence | rows |",
            "|---|---|---:|",
            *(f"| {in_markdown(source)} | {in_markdown(licence)} | {count:,} |" for source, licence, count in rows),
            "",
            "## Limits",
            "",
            _LIMITS,
            "",
            "## Needs",
            "",
            ", ".join(f"{name} {version}" for name, version in manifest.packages.items()),
            "",
        ]
    )
