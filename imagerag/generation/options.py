"""Fusion options of a pipeline call: the caller's arguments, with defaults that depend on the pipeline."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, get_args

from imagerag.errors import UserError
from imagerag.generation.arguments import Given
from imagerag.hspace.fusion import AdapterFusion, Fusion, FusionName, MaskedFusion, SlerpFusion

if TYPE_CHECKING:
    import torch

    from imagerag.generation.reference_mixin import ReferenceMixin
    from imagerag.hspace.adapter import HSpaceAdapter

MAX_REFERENCES = 64
MAX_SCALE = 10.0
"""Maximum adapter scale; the decoder was not trained on features so far from its usual inputs."""
_REFERENCES = {"adapter": 4, "slerp": 1}


def check_scale(what: str, scale: float) -> None:
    """Check that a scale is within its bounds.

    Raises:
        UserError: if it is not.
    """
    if not 0 <= scale <= MAX_SCALE:
        raise UserError(f"{what} must be between 0 and {MAX_SCALE:g}; got {scale}")


def warn_of_no_effect(why: str, **arguments: Any) -> None:
    """Warn the pipeline's caller of arguments that have no effect."""
    names = [name for name, value in arguments.items() if value is not None and value is not False]
    if names:
        warnings.warn(f"{why}: {', '.join(names)} has no effect", stacklevel=6)


def of_guidance(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of a call that only classifier-free guidance reads, unless they ask for nothing."""
    return {
        name: value
        for name, value in arguments.items()
        if (name.startswith("negative_") and value != "") or (name == "guidance_rescale" and value)
    }


@dataclass(frozen=True, kw_only=True)
class FusionOptions:
    """Fusion options of one call, all set and within their bounds."""

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
        """Return the caller's options, with defaults from the adapter, the base model and the index for None.

        Raises:
            UserError: if an option is out of bounds, or the adapter is missing.
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

    def fuse(
        self,
        adapter: "HSpaceAdapter | None",
        h_references: "torch.Tensor",
        weights: "torch.Tensor",
        masks: "torch.Tensor | None" = None,
    ) -> Fusion:
        """Return the fusion `F` of references (B, K, C, H, W) with lambda (B, K) and optional masks (B, K, H, W)."""
        if masks is not None:
            each = [slice(k, k + 1) for k in range(weights.shape[1])]
            parts = tuple(self.fuse(adapter, h_references[:, own], weights[:, own]) for own in each)
            return MaskedFusion(parts, masks)
        if self.fusion == "adapter":
            assert adapter is not None, "checked before"
            return AdapterFusion(adapter, h_references, weights, self.adapter_scale)
        return SlerpFusion(h_references, weights, self.w)

    def ignores(self, reference_weights: Sequence[Sequence[float]], *, masked: bool) -> bool:
        """Return whether weights of references have no effect: slerp divides each prompt's by their sum.

        Weights of 0 leave references out. Masked references are fused alone, so each is its own sum.
        """
        alike = all(min(own) > 0 and (masked or min(own) == max(own)) for own in reference_weights)
        return self.fusion == "slerp" and alike

    def __post_init__(self) -> None:
        """Check the bounds of all options."""
        if self.fusion not in get_args(FusionName):
            raise UserError(f"fusion is one of {', '.join(get_args(FusionName))}; got {self.fusion!r}")
        if not 0 <= self.num_references <= MAX_REFERENCES:
            raise UserError(f"num_references must be between 0 and {MAX_REFERENCES}; got {self.num_references}")
        if not -1 <= self.w <= 1:
            raise UserError(f"w, the weight of the base model in slerp, must be between -1 and 1; got {self.w}")
        check_scale("adapter_scale, of what the adapter adds,", self.adapter_scale)
        if not -1 <= self.threshold <= 1:
            raise UserError(f"similarity_threshold is a cosine, so between -1 and 1; got {self.threshold}")
