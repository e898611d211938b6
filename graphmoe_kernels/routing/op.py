"""Registration of the routing operators with torch: schemas, fakes (shapes only) and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.backend import without_autocast
from graphmoe_kernels.exact_linear import exact_linear
from graphmoe_kernels.routing.triton import launch


@torch.library.custom_op("graphmoe::route", mutates_args=())
def route_op(
    x: Tensor, router: Tensor, offset: Tensor | None, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, routing weights and expert ids: see `graphmoe_kernels.routing.triton.launch.route`."""
    return launch.route(x, router, offset, top_k, normalize)


@route_op.register_fake
def _(x, router, offset, top_k, normalize):
    return launch.allocate(x, router.shape[0], top_k)


@torch.library.custom_op("graphmoe::topk_softmax", mutates_args=())
def topk_softmax_op(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return routing weights and expert ids of fp32 logits: see `graphmoe_kernels.routing.triton.launch`."""
    return launch.topk_softmax(logits, top_k, normalize)


@topk_softmax_op.register_fake
def _(logits, top_k, normalize):
    return launch.allocate(logits, 0, top_k)[1:]


@torch.library.custom_op("graphmoe::routing_backward", mutates_args=())
def routing_backward_op(
    d_routing_weights: Tensor, d_logits: Tensor | None, logits: Tensor, expert_ids: Tensor, normalize: bool
) -> Tensor:
    """Return the gradient of the logits, [N, n] fp32."""
    return launch.backward(d_routing_weights, d_logits, logits, expert_ids, normalize)


@routing_backward_op.register_fake
def _(d_routing_weights, d_logits, logits, expert_ids, normalize):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, router, offset, _, ctx.normalize = inputs
    logits, _, expert_ids = output
    ctx.x_dtype, ctx.router_dtype, ctx.offset_dtype = x.dtype, router.dtype, None if offset is None else offset.dtype
    kept_x = x if ctx.needs_input_grad[1] else None
    kept_router = router if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(kept_x, kept_router, logits, expert_ids)
    ctx.set_materialize_grads(False)  # a zero gradient would be a launch, and another operand to read


def _route_backward(ctx: Any, d_logits: Any, d_routing_weights: Any, _: Any) -> Any:
    if d_logits is None and d_routing_weights is None:
        return (None,) * 5
    x, router, logits, expert_ids = ctx.saved_tensors
    total = d_logits  # [N, n]
    if d_routing_weights is not None:
        total = routing_backward_op(d_routing_weights, d_logits, logits, expert_ids, ctx.normalize)
    d_x = d_router = d_offset = None
    with without_autocast(total):  # whoever calls backward() inside autocast
        if ctx.needs_input_grad[0]:
            d_x = exact_linear(total, router.T).to(ctx.x_dtype)  # [N, D]
        if ctx.needs_input_grad[1]:
            d_router = exact_linear(total.T, x.T).to(ctx.router_dtype)  # [n, D]
        if ctx.needs_input_grad[2]:
            d_offset = total.to(ctx.offset_dtype)  # [N, n]
    return d_x, d_router, d_offset, None, None


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, _, ctx.normalize = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.set_materialize_grads(False)


def _topk_backward(ctx: Any, d_routing_weights: Any, _: Any) -> Any:
    if d_routing_weights is None:
        return None, None, None
    return routing_backward_op(d_routing_weights, None, *ctx.saved_tensors, ctx.normalize), None, None


route_op.register_autograd(_route_backward, setup_context=_save_route)
topk_softmax_op.register_autograd(_topk_backward, setup_context=_save_topk)
