"""`topk_softmax_routing` and `route_tokens`: what they promise, and what they refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.backend import resolve_backend, without_autocast
from graphmoe_kernels.routing import reference
from graphmoe_kernels.routing.op import topk_softmax_op
from graphmoe_kernels.routing.operands import Routing
from graphmoe_kernels.routing.run import run_routing
from graphmoe_kernels.routing.triton.launch import MAX_EXPERTS
from graphmoe_kernels.validation import (
    INTEGER_DTYPES,
    check_choice,
    check_device,
    check_flag,
    check_floats,
    check_shapes,
    check_tensor,
    check_top_k,
)

STATISTICS = (None, "topk", "full")


def topk_softmax_routing(
    logits: Tensor,
    top_k: int,
    *,
    normalize: bool = True,
    statistics: str | None = None,
    token_mask: Tensor | None = None,
    backend: str = "auto",
) -> Routing:
    """Return the routing by ``logits``: of their softmax the ``top_k`` largest (GraphMoE, section 3 and Eq. 4).

    A row with NaN, +inf or nothing but -inf gets NaN weights and experts that are still valid, distinct indices.
    Among equal logits Triton chooses the lower index; the other backends choose any.

    Args:
        logits: [N, n], fp64, fp32, fp16 or bf16; the softmax runs in fp32 at least.
        top_k: experts per token, 1 <= top_k <= n.
        normalize: divide the chosen probabilities by their sum.
        statistics: None, ``"topk"`` or ``"full"``: whether `Routing.tokens_per_expert` and
            `Routing.probability_sums` are computed, and how.
        token_mask: [N], bool or integers; tokens that the statistics leave out (padding) are False or 0, any other
            number counts once. Routing ignores it.
        backend: see `graphmoe_kernels.backend`.

    Raises:
        TypeError: ``logits`` is no dense tensor of fp64, fp32, fp16 or bf16, ``top_k`` no integer, ``normalize`` no
            bool, or the mask is of another dtype.
        ValueError: a wrong number of dimensions, ``top_k`` outside 1..n, an unknown ``statistics`` or backend, a mask
            of another shape or on another device, or more than 256 experts with Triton.
    """
    _check_matrix("logits", logits, "[tokens, experts]")
    backend = resolve_backend(backend, "logits", logits)
    _check_options(backend, "logits", logits, logits.shape[1], top_k, normalize, statistics, token_mask)
    with without_autocast(logits):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        route = topk_softmax_op if backend == "triton" else reference.topk_softmax
        routing_weights, expert_ids = route(logits, top_k, normalize)
        return _counted(Routing(routing_weights, expert_ids, logits), statistics, token_mask)


def route_tokens(
    x: Tensor,
    router: Tensor,
    top_k: int,
    *,
    offset: Tensor | None = None,
    normalize: bool = True,
    statistics: str | None = None,
    token_mask: Tensor | None = None,
    backend: str = "auto",
) -> Routing:
    """Return the routing by the logits ``offset + x router^T`` (GraphMoE, Eq. 4), which run in fp32 at least.

    With Triton product and routing are one kernel, and half-precision ``x`` is not copied to fp32.

    Args:
        x: [N, D] token states, of a dtype as above, like ``router`` and ``offset``.
        router: [n, D].
        top_k: experts per token, 1 <= top_k <= n.
        offset: [N, n] or None: logits to which the product is added.
        normalize: as in `topk_softmax_routing`; so are ``statistics``, ``token_mask`` and ``backend``.

    Raises:
        TypeError: ``x``, ``router`` or ``offset`` is no dense tensor of fp64, fp32, fp16 or bf16.
        ValueError: shapes that do not fit, tensors on different devices, and what `topk_softmax_routing` refuses.
    """
    _check_matrix("x", x, "[tokens, hidden]")
    backend = resolve_backend(backend, "x", x)
    _check_matrix("router", router, "[experts, hidden]")
    (num_tokens, width), num_experts = x.shape, router.shape[0]
    shapes = ((num_experts, width), None if offset is None else (num_tokens, num_experts))

    def told() -> str:
        return f"{num_tokens} tokens of width {width} (x) and {num_experts} experts (router)"

    check_shapes("", ("router", "offset"), (router, offset), shapes, told, ("x", x))
    _check_options(backend, "x", x, num_experts, top_k, normalize, statistics, token_mask)
    with without_autocast(x):
        routing = run_routing(x, router, top_k, offset=offset, normalize=normalize, backend=backend)
        return _counted(routing, statistics, token_mask)


def check_routed(num_experts: int) -> None:
    """`ValueError` for more experts than the Triton kernels choose from."""
    if num_experts > MAX_EXPERTS:
        raise ValueError(
            f"{num_experts} experts: the Triton kernels route up to {MAX_EXPERTS}; use fewer or backend='torch'"
        )


def _counted(routing: Routing, statistics: str | None, token_mask: Tensor | None) -> Routing:
    """The routing with its statistics, if any are asked for."""
    if statistics is None:
        return routing
    tokens, sums = reference.count(routing.logits, routing.expert_ids, statistics, token_mask)
    return routing._replace(tokens_per_expert=tokens, probability_sums=sums)


def _check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    check_floats(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}; flatten the batch first")


def _check_options(
    backend: str,
    name: str,
    main: Tensor,
    num_experts: int,
    top_k: int,
    normalize: bool,
    statistics: str | None,
    token_mask: Tensor | None,
) -> None:
    check_top_k(top_k, num_experts)
    check_flag("normalize", normalize)
    if backend == "triton":
        check_routed(num_experts)
    check_choice("statistics", statistics, STATISTICS)
    if token_mask is not None:
        check_tensor("token_mask", token_mask)
        if token_mask.shape != main.shape[:1]:
            raise ValueError(f"token_mask must be [{main.shape[0]}], got {list(token_mask.shape)}")
        check_device("token_mask", token_mask, name, main)
        if token_mask.dtype != torch.bool and token_mask.dtype not in INTEGER_DTYPES:
            raise TypeError(f"token_mask must be bool or integers, zero for padding, got {token_mask.dtype}")
