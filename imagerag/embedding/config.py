"""How an embedding job uses its machines."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from imagerag.embedding.encoder import Dtype


class EmbedConfig(BaseModel):
    """What is not set adapts to the machines that Ray knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["cpu", "cuda"] | None = Field(
        default=None, description="Where encoders run; unset: on GPUs if there are any."
    )
    dtype: Dtype | None = Field(
        default=None, description="What encoders compute in; unset: fp32 on CPUs, fp16 on GPUs."
    )
    num_workers: int | None = Field(
        default=None, ge=1, description="Encoders at work at a time; unset: one a GPU, or one for 8 CPU cores."
    )
    batch_size: int = Field(
        default=256, ge=1, le=16_384, description="Images that a worker embeds and writes at a time."
    )
    commit_every_s: float = Field(
        default=60.0, ge=0, description="Seconds of work that a killed job loses at most, beside what is in flight."
    )
    stall_timeout_s: float = Field(
        default=1800.0, gt=0, description="The job fails when no batch is finished for so many seconds."
    )
