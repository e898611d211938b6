"""Registration of the routing operators with torch: schemas, fakes (shapes only) and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels._ops import add_op_namespace_prefix
from graphmoe_kernels.backend import without_autocast
from graphmoe_kernels.exact_linear import exact_linear
from graphmoe_kernels.routing.triton import launch, launch_backward


@torch.library.custom_op(add_op_namespace_prefix("route"), mutates_args=())
def route_op(
    x: Tensor, router: Tensor, offset: Tensor | None, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, routing weights and expert ids: see `graphmoe_kernels.routing.triton.launch.route`."""
    return launch.route(x, router, offset, top_k, normalize)


@route_op.register_fake
def _(x, router, offset, top_k, normalize):
    return launch.allocate(x, router.shape[0], top_k)


@torch.library.custom_op(add_op_namespace_prefix("topk_softmax"), mutates_args=())
def topk_softmax_op(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return routing weights and expert ids of fp32 logits: see `graphmoe_kernels.routing.triton.launch`."""
    return launch.topk_softmax(logits, top_k, normalize)


@topk_softmax_op.register_fake
def _(logits, top_k, normalize):
    return launch.allocate(logits, 0, top_k)[1:]


@torch.library.custom_op(add_op_namespace_prefix("routing_backward"), mutates_args=())
def routing_backward_op(
    d_routing_weights: Tensor | None,
    d_logits: Tensor | None,
    logits: Tensor,
    expert_ids: Tensor,
    x: Tensor | None,
    router: Tensor | None,
    normalize: bool,
    dtype: torch.dtype,
    wants_total: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of logits, x and router: see `graphmoe_kernels.routing.triton.launch_backward.backward`.

    What is not asked for is empty, and so is the first where the logits' gradient is ``d_logits`` itself.
    """
    total, d_x, d_router = launch_backward.backward(
        d_routing_weights, d_logits, logits, expert_ids, x, router, normalize, dtype, wants_total
    )
    given = wants_total and d_routing_weights is not None
    return (
        total if given and total is not None else logits.new_empty(0),
        logits.new_empty(0, dtype=dtype) if d_x is None else d_x,
        logits.new_empty(0) if d_router is None else d_router,
    )


@routing_backward_op.register_fake
def _(d_routing_weights, d_logits, logits, expert_ids, x, router, normalize, dtype, wants_total):
    num_tokens, num_experts = logits.shape
    given = wants_total and d_routing_weights is not None
    return (
        logits.new_empty((num_tokens, num_experts) if given else (0,)),
        logits.new_empty((0,) if router is None else (num_tokens, router.shape[1]), dtype=dtype),
        logits.new_empty((0,) if x is None else (num_experts, x.shape[1])),
    )


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
    needs_x, needs_router, needs_offset, *_ = ctx.needs_input_grad
    within = logits.shape[1] <= launch_backward.PRODUCT_EXPERTS
    read = (x, router) if within else (None, None)
    total: Any = d_logits  # [N, n]
    d_x: Any = None  # [N, D]
    d_router: Any = None  # [n, D]
    if d_routing_weights is not None or (within and (needs_x or needs_router)):
        wants_total = needs_offset or not within
        given = d_routing_weights, d_logits, logits, expert_ids
        found, d_x, d_router = routing_backward_op(*given, *read, ctx.normalize, ctx.x_dtype, wants_total)
        total = d_logits if d_routing_weights is None else found
    if not within:
        with without_autocast(total):  # whoever calls backward() inside autocast
            d_x = exact_linear(total, router.T) if needs_x else None
            d_router = exact_linear(total.T, x.T) if needs_router else None
    return (
        d_x.to(ctx.x_dtype) if needs_x else None,
        d_router.to(ctx.router_dtype) if needs_router else None,
        total.to(ctx.offset_dtype) if needs_offset else None,
        None,
        None,
    )


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, _, ctx.normalize = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.set_materialize_grads(False)


def _topk_backward(ctx: Any, d_routing_weights: Any, _: Any) -> Any:
    if d_routing_weights is None:
        return None, None, None
    logits, expert_ids = ctx.saved_tensors
    given = d_routing_weights, None, logits, expert_ids, None, None
    return routing_backward_op(*given, ctx.normalize, logits.dtype, True)[0], None, None


route_op.register_autograd(_route_backward, setup_context=_save_route)
topk_softmax_op.register_autograd(_topk_backward, setup_context=_save_topk)
