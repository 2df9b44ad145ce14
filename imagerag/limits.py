"""Bounds of seeds and guidance scales, checked before a model is loaded."""

from imagerag.errors import UserError

MAX_SEED = 2**63 - 1
"""Largest seed that parquet, MLflow and torch can all store."""
MAX_GUIDANCE = 100.0
"""Largest guidance scale; far above any useful value."""


def check_seeds(first: int, count: int = 1) -> None:
    """Check that the `count` seeds from `first` on are valid.

    Raises:
        UserError: if one is out of bounds.
    """
    if not 0 <= first <= MAX_SEED - count + 1:
        raise UserError(f"seeds are 0 to {MAX_SEED}; got {first} and {count} images")


def check_guidance(scale: float) -> None:
    """Check that a guidance scale is valid.

    Raises:
        UserError: if it is out of bounds or NaN.
    """
    if not 0 <= scale <= MAX_GUIDANCE:
        raise UserError(f"the guidance scale must be between 0 and {MAX_GUIDANCE:g}; got {scale:g}")
