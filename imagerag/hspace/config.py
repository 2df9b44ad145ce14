"""Configuration of the cached-features job."""

from pydantic import Field, field_validator

from imagerag.base.files import check_spec
from imagerag.retrieval.schema import Fit
from imagerag.workers import CommittingConfig


class FeaturesConfig(CommittingConfig):
    """How features are computed and cached. Unset values adapt to Ray's machines."""

    base: str = Field(
        default="tiny",
        description="Base model: `tiny`, a hub id and commit (`org/name@<commit>`), or a diffusers folder.",
    )
    fit: Fit | None = Field(
        default=None,
        description="How pictures are made square: `crop` to the centre; `pad` with the border's colour; `auto` pads "
        "pictures with a transparent or single-colour border, and crops others. A change re-encodes all rows. Unset: "
        "the fit of the index's features, or `auto` if it has none.",
    )
    batch_size: int = Field(default=32, ge=1, le=1_024, description="Pictures per batch on a worker.")

    _check_base = field_validator("base")(check_spec)
