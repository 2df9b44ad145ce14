"""How a call of the pipeline fuses references: what the caller chose, and for the rest what suits the pipeline."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, get_args

from imagerag.errors import UserError
from imagerag.generation.arguments import Given
from imagerag.hspace.fusion import FusionName

if TYPE_CHECKING:
    from imagerag.generation.reference_mixin import ReferenceMixin

MAX_REFERENCES = 64
MAX_SCALE = 10.0
"""Of what an adapter adds. The decoder knows nothing of what lies that far out."""
_REFERENCES = {"adapter": 4, "slerp": 1}


def check_scale(what: str, scale: float) -> None:
    """Make sure that a scale is within its bounds.

    Raises:
        UserError: if not.
    """
    if not 0 <= scale <= MAX_SCALE:
        raise UserError(f"{what} must be between 0 and {MAX_SCALE:g}; got {scale}")


@dataclass(frozen=True, kw_only=True)
class FusionOptions:
    """Options of one call, all of them set and within their bounds."""

    fusion: FusionName
    num_references: int
    w: float
    adapter_scale: float
    threshold: float

    @classmethod
    def of(
        cls,
        pipeline: "ReferenceMixin",
        given: Given,
        fusion: FusionName | None,
        num_references: int | None,
        *,
        w: float | None,
        adapter_scale: float | None,
        threshold: float | None,
    ) -> Self:
        """Return what the caller chose; what is None is taken from the adapter, the base model and the index.

        Raises:
            UserError: if references can't be fused like this.
        """
        adapter, config = pipeline.adapter, pipeline.config
        if fusion is None:
            has_references = given.any or config.index_name is not None
            fusion = "none" if not has_references else "slerp" if adapter is None else "adapter"
        if fusion == "adapter" and adapter is None:
            raise UserError(
                "fusion 'adapter' needs an adapter, and this pipeline has none: use 'slerp', or give it one"
            )
        if num_references is None:
            num_references = _REFERENCES.get(fusion, 0)
            if num_references and pipeline.index is not None:
                num_references = min(num_references, pipeline.index.retriever.num_rows)
        for name, value, user in (("w", w, "slerp"), ("adapter_scale", adapter_scale, "adapter")):
            if value is not None and fusion != user:
                warnings.warn(f"{name} is of fusion {user!r}; with {fusion!r} it has no effect", stacklevel=6)
        if adapter_scale is None:
            adapter_scale = pipeline._reference_scale
        if adapter_scale is None:
            adapter_scale = 1.0 if adapter is None else adapter.config.default_scale
        return cls(
            fusion=fusion,
            num_references=num_references,
            w=config.slerp_w if w is None else w,
            adapter_scale=adapter_scale,
            threshold=config.similarity_threshold if threshold is None else threshold,
        )

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.fusion not in get_args(FusionName):
            raise UserError(f"fusion is one of {', '.join(get_args(FusionName))}; got {self.fusion!r}")
        if not 0 <= self.num_references <= MAX_REFERENCES:
            raise UserError(f"num_references must be between 0 and {MAX_REFERENCES}; got {self.num_references}")
        if not 0 <= self.w <= 1:
            raise UserError(f"w, the weight of the base model in slerp, must be between 0 and 1; got {self.w}")
        check_scale("adapter_scale, of what the adapter adds,", self.adapter_scale)
        if not -1 <= self.threshold <= 1:
            raise UserError(f"similarity_threshold is a cosine, so between -1 and 1; got {self.threshold}")
