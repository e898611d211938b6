"""Routing as a layer calls it: nothing is checked or cast."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.registration import seen_from_outside
from graphmoe_kernels.routing import launch, reference
from graphmoe_kernels.routing.op import route_op
from graphmoe_kernels.routing.operands import Routing


def run_routing(
    x: Tensor,
    router: Tensor,
    top_k: int,
    *,
    offset: Tensor | None = None,
    normalize: bool = True,
    backend: str,
) -> Routing:
    """Return the routing of x [N, D] by ``router`` [n, D]: `graphmoe_kernels.route_tokens` without statistics.

    The arguments are known to be right; ``backend`` is one of `resolve_backend`'s; autocast is off unless it is Triton.
    """
    if backend != "triton":
        logits = reference.project(x, router, offset)
        weights, ids, *_ = reference.route(logits, top_k, normalize, None, None)
        return Routing(weights, ids, None, None, logits, torch.empty(0, dtype=torch.int32, device=x.device))
    if seen_from_outside(x, router, offset):
        logits, weights, ids, _, _, tickets = route_op(x, router, offset, None, top_k, normalize, None)
    else:
        logits, weights, ids, _, _, tickets = launch.forward(x, router, offset, None, top_k, normalize, None)
    return Routing(weights, ids, None, None, logits, tickets)
