"""How cached features are made."""

from pydantic import Field, field_validator

from imagerag.generation.spec import check_spec
from imagerag.retrieval.schema import Fit
from imagerag.workers import CommittingConfig


class FeaturesConfig(CommittingConfig):
    """What is not set adapts to the machines that Ray knows."""

    base: str = Field(
        default="tiny",
        description="The base model: `tiny`, a hub id and commit (`org/name@<commit>`), or a diffusers folder.",
    )
    fit: Fit | None = Field(
        default=None,
        description="How a picture that is no square is shown to the base model: `crop`, its middle square; `pad`, all "
        "of it on the colour of its border; `auto`, padded where its border is transparent or of one colour. Another "
        "one than before encodes all rows anew. Unset: as the index's features are, `auto` where it has none.",
    )
    batch_size: int = Field(default=32, ge=1, le=1_024, description="Pictures that a worker encodes at a time.")

    _check_base = field_validator("base")(check_spec)
