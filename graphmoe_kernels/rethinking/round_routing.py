"""Routing of one round: by one router for whole experts, by one for every linear, or by none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.backend import resolve_backend
from graphmoe_kernels.experts.triton.launch_stream import suits
from graphmoe_kernels.experts.triton.sizes import Sizes
from graphmoe_kernels.launching import SKINNY_TOKENS
from graphmoe_kernels.mixing import mixing_weights
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking.weights import RethinkingSpec
from graphmoe_kernels.routing import Routing, expert_order, route_tokens


class RoundSettings(NamedTuple):
    """What a call's rounds have in common: the spec and the backend."""

    spec: RethinkingSpec
    backend: str


class RoundRouting(NamedTuple):
    """How the tokens of a round are spread over the experts.

    Attributes:
        routing_weights, expert_ids: [N, S], the slots that `expert_swiglu` takes.
        mixing: [N, 2, n], the weights with which gate and up mix their experts; None for chosen experts.
        routings: of the routers that read x, in their order.
    """

    routing_weights: Tensor
    expert_ids: Tensor
    mixing: Tensor | None
    routings: tuple[Routing, ...]


def route(
    x: Tensor,
    router: Tensor | None,
    mixed: bool,
    settings: RoundSettings,
    before: RoundRouting | None = None,
) -> RoundRouting:
    """This round's routing of R x under the layer's settings, in fp32 at least.

    Args:
        x: [N, D] or, in a folded round, H [N, G].
        router: `LayerWeights.input_router` or, in a folded round, its product with W_g.
        mixed: whether its experts are mixed in every linear.
        before: the first round's routing, in a folded round: its logits are added.
    """
    if router is None or mixed:
        slots = one_slot(x) if before is None else (before.routing_weights, before.expert_ids)
        if router is None:
            return RoundRouting(*slots, None, ())
    with named_range("routing"):
        routers = router.chunk(2) if mixed else (router,)
        offsets = [None] * len(routers) if before is None else [routing.logits for routing in before.routings]
        routings = tuple(route_one(x, own, settings, offset) for own, offset in zip(routers, offsets, strict=True))
        if not mixed:
            return RoundRouting(routings[0].routing_weights, routings[0].expert_ids, None, routings)
        return RoundRouting(*slots, torch.stack([mixing_weights(r) for r in routings], dim=1), routings)


def one_slot(x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and experts [N, 1] by which every token has all of expert 0."""
    tokens, dtype = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    return x.new_ones(tokens, 1, dtype=dtype), torch.zeros(tokens, 1, dtype=torch.int64, device=x.device)


def route_one(
    x: Tensor,
    router: Tensor,
    settings: RoundSettings,
    offset: Tensor | None = None,
) -> Routing:
    """`route_tokens` under the layer's settings."""
    spec = settings.spec
    return route_tokens(
        x,
        router,
        spec.top_k,
        offset=offset,
        normalize=spec.normalize,
        backend=settings.backend,
    )


def token_order(routing: RoundRouting, gate: Tensor, down_A: Tensor, backend: str) -> Tensor | None:
    """An order of the tokens for the Triton kernels, or None where it gains nothing: elsewhere, for few tokens, where
    all tokens have the same expert, and where a forward that runs as a stream has no backward after it.

    Every round has its own, as rethinking sends tokens to other experts: in the order of another round a tile holds
    more experts, and the kernel's time follows their number. It never changes a result.
    """
    if resolve_backend(backend, "gate", gate) != "triton" or gate.shape[0] <= SKINNY_TOKENS:
        return None
    if routing.mixing is not None or not routing.routings:
        return None
    n, r, width = down_A.shape
    size = Sizes(gate.shape[0], width, n, r, routing.expert_ids.shape[1])
    if not torch.is_grad_enabled() and suits(size, gate.dtype):
        return None
    with named_range("routing"):
        return expert_order(routing.expert_ids)


def mixed_weight(routing: RoundRouting, spec: RethinkingSpec, dtype: torch.dtype) -> Tensor | None:
    """sum_j w_j, [N, 1], or None when it is 1 by construction."""
    if spec.normalize or routing.mixing is not None or not routing.routings:
        return None
    return routing.routing_weights.sum(dim=-1, keepdim=True).to(dtype)
