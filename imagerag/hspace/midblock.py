"""Access to a UNet's H-space during its own forward pass, for fusion or extraction (paper, Sec. 3.1).

The UNet's forward is called as usual, so offloading, `torch.compile`, LoRA and other hooks work. One permanent forward
hook on the mid block passes its output to the function that the current context sets, or leaves it unchanged if none is
set. The context is a `ContextVar`: each thread has its own, and contexts nest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from diffusers import UNet2DConditionModel

from imagerag.base.model import check_mid_block
from imagerag.errors import UserError
from imagerag.hspace.fusion import Fusion

_current: ContextVar[Callable[[torch.Tensor], torch.Tensor] | None] = ContextVar("hspace", default=None)


class _EncodedError(Exception):
    """Stops a forward pass after the mid block, carrying its output."""

    def __init__(self, h: torch.Tensor) -> None:
        super().__init__()
        self.h = h


def prepare(unet: UNet2DConditionModel) -> None:
    """Register the hook on a UNet's mid block. Idempotent; the hook alone changes nothing.

    `torch.compile` only sees hooks that are registered before it traces.

    Raises:
        UserError: if the UNet has no mid block.
    """
    check_mid_block(unet.config)
    if _hook not in unet.mid_block._forward_hooks.values():
        unet.mid_block.register_forward_hook(_hook)


@contextmanager
def fusing(unet: UNet2DConditionModel, fusion: Fusion | None, size: int) -> Iterator[None]:
    """Apply `fusion` to `h` in every forward pass of the UNet within the context.

    Args:
        unet: the UNet.
        fusion: fusion of the references; None leaves `h` unchanged.
        size: number of pictures B. With guidance, the batch is larger, and the last B rows are the conditional ones.

    Raises:
        UserError: if no forward pass called the hook.
    """
    num_forwards = 0

    def fuse(h: torch.Tensor) -> torch.Tensor:
        nonlocal num_forwards
        num_forwards += 1
        assert fusion is not None
        return fusion(h) if len(h) == size else torch.cat([h[:-size], fusion(h[-size:])])

    prepare(unet)
    with _set(None if fusion is None else fuse):
        yield
    if fusion is not None and not num_forwards:
        raise UserError(
            "the UNet ran without its references: torch.compile traced it, or one like it, before this pipeline "
            "registered its hook. Call torch.compiler.reset() first; if both are in use, set "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False"
        )


def encode(unet: UNet2DConditionModel, sample: torch.Tensor, timestep: int, **arguments: Any) -> torch.Tensor:
    """Return the mid block's output (B, C, H, W) without running the decoder.

    Args:
        unet: the UNet; it runs eagerly, because cached features were computed eagerly.
        sample: latents (B, C, H, W).
        timestep: timestep of all latents.
        arguments: further arguments of the UNet's forward.

    Raises:
        UserError: if the UNet has an IP-Adapter.
    """
    if unet.config.encoder_hid_dim_type is not None:
        raise UserError(
            "reference pictures are encoded by the base model alone, but its UNet has an IP-Adapter: call "
            "unload_ip_adapter first, or use an index, whose features are cached"
        )
    prepare(unet)
    try:
        with _set(_stop), torch.compiler.set_stance("force_eager"):
            unet(sample, timestep, **arguments)
    except _EncodedError as encoded:
        return encoded.h
    raise AssertionError("a UNet has a mid block")


def _stop(h: torch.Tensor) -> NoReturn:
    raise _EncodedError(h)


@contextmanager
def _set(change: Callable[[torch.Tensor], torch.Tensor] | None) -> Iterator[None]:
    token = _current.set(change)
    try:
        yield
    finally:
        _current.reset(token)


def _hook(_module: torch.nn.Module, _arguments: Any, h: torch.Tensor) -> torch.Tensor | None:
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        changed: torch.Tensor = _change_in_graph(h)
        return changed
    eager: torch.Tensor | None = _change(h)
    return eager


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _change(h: torch.Tensor) -> torch.Tensor | None:
    change = _current.get()
    return None if change is None else change(h)


@torch.library.custom_op("imagerag::change_h", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _change_in_graph(h: torch.Tensor) -> torch.Tensor:
    """Apply the context's change as an opaque operator: no graph break, and the context is read at run time."""
    changed, promised = _change(h), torch.empty_like(h)
    if changed is None or changed is h:  # operators must not return their inputs
        return promised.copy_(h)
    # A fusion of channels-last features may be contiguous, but the compiled decoder reads them with their own strides.
    return changed if changed.stride() == promised.stride() else promised.copy_(changed)


@_change_in_graph.register_fake
def _(h: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(h)
