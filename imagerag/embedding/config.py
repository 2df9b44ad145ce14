"""Configuration of the embedding job."""

from pydantic import Field

from imagerag.workers import CommittingConfig


class EmbedConfig(CommittingConfig):
    """How a corpus is embedded. Unset values adapt to Ray's machines."""

    batch_size: int = Field(default=256, ge=1, le=16_384, description="Images per batch on a worker, and per write.")
