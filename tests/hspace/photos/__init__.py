"""Photographs of things, cut out or whole, as a user's own folder has them; ATTRIBUTION.md says whose they are."""

from pathlib import Path

from PIL import Image


def load_photos() -> dict[str, Image.Image]:
    """Return the photographs by what they show. Cut-outs have transparency; sides are at most 256 pixels."""
    paths = [path for path in Path(__file__).parent.iterdir() if path.suffix in (".jpg", ".png")]
    return {path.stem.replace("-", " "): Image.open(path) for path in sorted(paths)}
