"""A UNet's H-space inside its own forward: references are fused there, or it is taken out (paper, Sec. 3.1).

The UNet is run as everybody runs it, so that offloading, `torch.compile`, LoRA and others' hooks work. One forward hook
on its mid block, which stays there, gives the mid block's output to what the current context names, and leaves it alone
where it names nothing. A context is a `contextvars` one: each thread has its own, and they nest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from diffusers import UNet2DConditionModel

from imagerag.errors import UserError
from imagerag.hspace.fusion import Fusion

_current: ContextVar[Callable[[torch.Tensor], torch.Tensor] | None] = ContextVar("hspace", default=None)


class _EncodedError(Exception):
    """Ends a forward after the mid block."""

    def __init__(self, h: torch.Tensor) -> None:
        super().__init__()
        self.h = h


def prepare(unet: UNet2DConditionModel) -> None:
    """Put the hook on a UNet's mid block, where it is not there yet. By itself it changes nothing.

    `torch.compile` sees only hooks that are there when it traces.
    """
    if _hook not in unet.mid_block._forward_hooks.values():
        unet.mid_block.register_forward_hook(_hook)


@contextmanager
def fusing(unet: UNet2DConditionModel, fusion: Fusion | None, size: int) -> Iterator[None]:
    """Have `fusion` change `h` in every forward of the UNet in this context; None has it changed by nothing.

    Args:
        unet: a prepared one.
        fusion: of the references.
        size: B, its pictures. Of a larger batch they are the last: guidance puts what has no text before them.

    Raises:
        UserError: if no forward asked the hook.
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
            "the UNet ran without its references: torch.compile traced it, or one like it, before it was this "
            "pipeline's. Call torch.compiler.reset() first, and where both are in use have "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False"
        )


def encode(unet: UNet2DConditionModel, sample: torch.Tensor, timestep: int, **arguments: Any) -> torch.Tensor:
    """Return the mid block's output (B, C, H, W), without running what comes after it.

    Args:
        unet: any UNet; it is run eagerly, as cached features were made.
        sample: latents (B, C, H, W).
        timestep: of all of them.
        arguments: of the UNet's own forward.

    Raises:
        UserError: if it has an IP-Adapter.
    """
    if unet.config.encoder_hid_dim_type is not None:
        raise UserError(
            "reference pictures are encoded by the base model alone, and its UNet has an IP-Adapter: take it off by "
            "unload_ip_adapter, or use an index, whose features are encoded before"
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
    """As one opaque step of a compiled graph, so that it is whole, and the context is read whenever it runs."""
    changed = _change(h)
    return h.clone() if changed is None or changed is h else changed  # an operator returns no argument of its own


@_change_in_graph.register_fake
def _(h: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(h)
