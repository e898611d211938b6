"""Routing as a layer calls it: nothing is checked or cast."""

from __future__ import annotations

from torch import Tensor

from graphmoe_kernels.exact_linear import exact_linear
from graphmoe_kernels.registration import seen_from_outside
from graphmoe_kernels.routing import reference
from graphmoe_kernels.routing.op import route_op
from graphmoe_kernels.routing.operands import Routing
from graphmoe_kernels.routing.triton import launch


def run_routing(
    x: Tensor,
    router: Tensor,
    top_k: int,
    *,
    offset: Tensor | None = None,
    normalize: bool = True,
    backend: str,
    unseen: bool = False,
) -> Routing:
    """Return the routing of x [N, D] by ``router`` [n, D]: `graphmoe_kernels.route_tokens` without statistics.

    The arguments are known to be right; ``backend`` is one of `resolve_backend`'s; autocast is off unless it is Triton.
    ``unseen``: it is known that nobody looks on (`graphmoe_kernels.registration.unseen`).
    """
    if backend != "triton":
        logits = exact_linear(x, router, offset)
        return Routing(*reference.topk_softmax(logits, top_k, normalize), logits)
    seen = not unseen and seen_from_outside(x, router, offset)
    route = route_op if seen else launch.route
    logits, routing_weights, expert_ids = route(x, router, offset, top_k, normalize)
    return Routing(routing_weights, expert_ids, logits)
