"""Registration of `graphmoe::route` with torch: schema, fake (shapes only) and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.exact_linear import exact_linear
from graphmoe_kernels.routing import launch


@torch.library.custom_op("graphmoe::route", mutates_args=())
def route_op(
    x: Tensor | None,
    router: Tensor | None,
    offset: Tensor | None,
    token_mask: Tensor | None,
    top_k: int,
    normalize: bool,
    statistics: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits, weights, experts, counts, mass, tickets: see `graphmoe_kernels.routing.launch.forward`."""
    return launch.forward(x, router, offset, token_mask, top_k, normalize, statistics)


@route_op.register_fake
def _(x, router, offset, token_mask, top_k, normalize, statistics):
    main, num_experts = launch.main_input(x, router, offset)
    stores_logits = x is not None or main.dtype != torch.float32
    return launch.allocate(main, num_experts, top_k, stores_logits, statistics)


@torch.library.custom_op("graphmoe::route_backward", mutates_args=())
def route_backward_op(
    d_logits: Tensor | None,
    d_weights: Tensor | None,
    d_mass: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    token_mask: Tensor | None,
    normalize: bool,
    statistics: str | None,
) -> Tensor:
    """The gradient of the logits, [N, n] fp32."""
    return launch.backward(d_logits, d_weights, d_mass, logits, experts, token_mask, normalize, statistics)


@route_backward_op.register_fake
def _(d_logits, d_weights, d_mass, logits, *rest):
    return logits.new_empty(logits.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, router, offset, token_mask, _, ctx.normalize, ctx.statistics = inputs
    logits, _, experts, counts, *_ = output
    ctx.stores_logits = x is not None or offset.dtype != torch.float32
    ctx.x_dtype, ctx.offset_dtype = (None if t is None else t.dtype for t in (x, offset))
    kept_x = x if ctx.needs_input_grad[1] else None
    kept_router = router if ctx.needs_input_grad[0] else None
    ctx.router_dtype = None if router is None else router.dtype
    ctx.save_for_backward(kept_x, kept_router, logits if ctx.stores_logits else offset, experts, token_mask)
    ctx.mark_non_differentiable(counts)
    ctx.set_materialize_grads(False)  # a zero gradient would be a launch, and another operand to read


def _backward(
    ctx: Any, d_logits: Any, d_weights: Any, d_experts: Any, d_counts: Any, d_mass: Any, d_tickets: Any
) -> Any:
    x, router, logits, experts, token_mask = ctx.saved_tensors
    d_logits = d_logits if ctx.stores_logits else None
    d_mass = d_mass if ctx.statistics is not None else None
    if d_logits is None and d_weights is None and d_mass is None:
        return (None,) * 7
    total = route_backward_op(
        d_logits, d_weights, d_mass, logits, experts, token_mask, ctx.normalize, ctx.statistics
    )  # [N, n]
    d_x = d_router = d_offset = None
    with torch.autocast(total.device.type, enabled=False):  # whoever calls backward() inside autocast
        if ctx.needs_input_grad[0]:
            d_x = exact_linear(total, router.T).to(ctx.x_dtype)  # [N, D]
        if ctx.needs_input_grad[1]:
            d_router = exact_linear(total.T, x.T).to(ctx.router_dtype)  # [n, D]
        if ctx.needs_input_grad[2]:
            d_offset = total.to(ctx.offset_dtype)  # [N, n]
    return d_x, d_router, d_offset, None, None, None, None


route_op.register_autograd(_backward, setup_context=_setup_context)
