"""Configurations of indexes and of their publication."""

from pydantic import Field

from imagerag.config import Config

EXACT_BELOW = 5_000
"""Exact search took 10 ms for 5,000 rows of 384 dimensions and 23 ms for 10,000; IVF_SQ took 7 ms for both."""
MAX_SHRINK = 0.5


class IndexConfig(Config):
    """How indexes are built."""

    exact_below: int = Field(
        default=EXACT_BELOW,
        ge=1_000,
        description="Tables with fewer rows are searched exactly, without a vector index.",
    )
    # At 0.98, one prompt in a hundred of the sample corpus lost the concept that exact search finds.
    target_recall: float = Field(
        default=0.99,
        ge=0.5,
        le=1.0,
        description="Recall@10 that a search must reach; it probes as few partitions of the index as that requires.",
    )


class PublishConfig(Config):
    """Conditions for publishing a version."""

    max_shrink: float = Field(
        default=MAX_SHRINK,
        ge=0.0,
        le=1.0,
        description="Largest share of its rows that the table may lose; also checked before rows are deleted.",
    )
    min_recall: float = Field(default=0.95, ge=0.0, le=1.0, description="Minimum recall@10 compared with exact search.")
    keep: int = Field(
        default=5,
        ge=1,
        le=100,
        description="Number of publications kept for a rollback, including the current one. A publication that only "
        "adds features to the same rows replaces the one without them.",
    )
