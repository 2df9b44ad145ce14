"""Bounds of numbers that people give, checked before anything is loaded."""

from imagerag.errors import UserError

MAX_SEED = 2**63 - 1
"""What a parquet file, MLflow and torch can all hold."""
MAX_GUIDANCE = 100.0
"""Of classifier-free guidance; far more than any model makes pictures with."""


def check_seeds(first: int, count: int = 1) -> None:
    """Make sure that there are `count` seeds from `first` on.

    Raises:
        UserError: if not.
    """
    if not 0 <= first <= MAX_SEED - count + 1:
        raise UserError(f"seeds are 0 to {MAX_SEED}; got {first} and {count} images")


def check_guidance(scale: float) -> None:
    """Make sure that a guidance scale is a number within its bounds.

    Raises:
        UserError: if not.
    """
    if not 0 <= scale <= MAX_GUIDANCE:
        raise UserError(f"the guidance scale must be between 0 and {MAX_GUIDANCE:g}; got {scale:g}")
