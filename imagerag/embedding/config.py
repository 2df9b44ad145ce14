"""How an embedding job uses its machines."""

from pydantic import Field

from imagerag.workers import CommittingConfig


class EmbedConfig(CommittingConfig):
    """What is not set adapts to the machines that Ray knows."""

    batch_size: int = Field(
        default=256, ge=1, le=16_384, description="Images that a worker embeds and writes at a time."
    )
