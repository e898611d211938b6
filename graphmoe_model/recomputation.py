"""Activation checkpointing runs a layer a second time, in the backward pass: the second run must be the first again.

A layer's graph depends on which adapter is active, on its dropout and on its scaling. Without checkpointing these may
change between a forward and its backward pass; with it, the layer would be differentiated in another state than it ran
in. The original graph's nodes know what they were made with, so `same_run` compares, and raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

if TYPE_CHECKING:
    from graphmoe_model.layer import RoutedLayer


class Run(NamedTuple):
    """What a forward of a layer depends on besides tensors: the active adapter's name, its dropout rate and scaling."""

    adapter: str | None
    dropout: float
    scaling: float


class _SameRun(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, layer: RoutedLayer, run: Run) -> Tensor:
        ctx.layer, ctx.run = layer, run
        ctx.save_for_backward(y.new_empty(0))  # to ask for it has a checkpointed layer run again
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        try:
            _ = ctx.saved_tensors
        except CheckpointError as error:
            _check(ctx.run, ctx.layer.run(), error)
            raise
        if ctx.layer.repeated_in == torch._C._current_graph_task_id():
            _check(ctx.run, ctx.layer.run(), None)
        return gradients[0], None, None


def same_run(y: Tensor, layer: RoutedLayer) -> Tensor:
    """A layer's output y; its backward pass raises if checkpointing ran the layer again in another state than now.

    Raises:
        RuntimeError: in the backward pass; it names both states.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and y.requires_grad):
        return y
    result: Tensor = _SameRun.apply(y, layer, layer.run())
    return result


def _check(first: Run, now: Run, error: Exception | None) -> None:
    if first == now:
        return
    if first.adapter != now.adapter:
        was, is_now = (f"the adapter {r.adapter!r} active" if r.adapter else "adapters disabled" for r in (first, now))
        what = f"the forward ran with {was}, its backward pass with {is_now}"
    elif first.scaling != now.scaling:
        what = (
            f"the forward ran with the scaling {first.scaling:.6g}, its backward pass with {now.scaling:.6g}: "
            "rescale_adapter_scale or set_scale changed it in between"
        )
    else:
        what = (
            f"the forward ran with dropout {first.dropout}, its backward pass with {now.dropout}: the model went "
            "between model.train() and model.eval() in between"
        )
    raise RuntimeError(
        f"{what}; activation checkpointing repeats the forward in the backward pass, so the gradients would be those "
        "of another computation. Call backward() in the state that the forward ran in, or turn gradient checkpointing "
        "off"
    ) from error
