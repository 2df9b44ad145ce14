"""How an embedding job uses its machines."""

from pydantic import Field

from imagerag.workers import WorkersConfig


class EmbedConfig(WorkersConfig):
    """What is not set adapts to the machines that Ray knows."""

    batch_size: int = Field(
        default=256, ge=1, le=16_384, description="Images that a worker embeds and writes at a time."
    )
    commit_every_s: float = Field(
        default=60.0, ge=0, description="Seconds of work that a killed job loses at most, beside what is in flight."
    )
