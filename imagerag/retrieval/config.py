"""Configurations of indexes and of their publication.

What a run leaves unset is as the last run that set it: a run that somebody else's publication triggers must not replace
indexes, or drop publications, by defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from imagerag.config import Config

MAX_SHRINK = 0.5


class IndexConfig(Config):
    """How indexes are built."""

    exact_below: int | None = Field(
        default=None,
        ge=1_000,
        description="Tables with fewer rows are searched exactly, without a vector index; unset: as in the last build, "
        "5,000 in the first.",
    )
    target_recall: float | None = Field(
        default=None,
        ge=0.5,
        le=1.0,
        description="Recall@10 that a search must reach; it probes as few partitions of the index as that requires. "
        "Unset: as in the last build, 0.99 in the first.",
    )

    def rules(self, last: Mapping[str, Any]) -> "IndexRules":
        """Return all values; unset ones are those of `last`, or else the first build's."""
        return IndexRules(**{**last, **self.model_dump(exclude_none=True)})


@dataclass(frozen=True, kw_only=True)
class IndexRules:
    """An `IndexConfig` with all values."""

    exact_below: int = 5_000
    """Exact search took 10 ms for 5,000 rows of 384 dimensions and 23 ms for 10,000; IVF_SQ took 7 ms for both."""
    target_recall: float = 0.99
    """At 0.98, one prompt in a hundred of the sample corpus lost the concept that exact search finds."""


class PublishConfig(Config):
    """Conditions for publishing a version."""

    max_shrink: float = Field(
        default=MAX_SHRINK,
        ge=0.0,
        le=1.0,
        description="Largest share of its rows that the table may lose; also checked before rows are deleted. It holds "
        "for this run only.",
    )
    min_recall: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Minimum recall@10 compared with exact search; unset: as last set for this corpus, at first 0.95.",
    )
    keep: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Number of publications kept for a rollback, including the current one; unset: as last set for "
        "this corpus, at first 5. A publication that only adds features to the same rows replaces the one without "
        "them.",
    )

    def lasting(self) -> dict[str, Any]:
        """Return what is set for later publications too; `max_shrink` permits one update to delete rows."""
        return self.model_dump(exclude_none=True, exclude={"max_shrink"})


@dataclass(frozen=True, kw_only=True)
class PublishRules:
    """What holds for every publication of a table."""

    min_recall: float = 0.95
    keep: int = 5
