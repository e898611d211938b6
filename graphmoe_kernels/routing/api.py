"""`topk_softmax_routing`, `route_tokens` and `expert_order`: what they promise, and what they refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.backend import resolve_backend, without_autocast
from graphmoe_kernels.routing import reference
from graphmoe_kernels.routing.op import topk_softmax_op
from graphmoe_kernels.routing.operands import Routing
from graphmoe_kernels.routing.run import run_expert_order, run_routing
from graphmoe_kernels.routing.triton.launch import MAX_EXPERTS
from graphmoe_kernels.validation import (
    INTEGER_DTYPES,
    check_device,
    check_flag,
    check_floats,
    check_tensor,
    check_top_k,
    shown,
)

STATISTICS = ("topk", "full")


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
    num_tokens, num_experts = x.shape[0], router.shape[0]
    if router.shape[1] != x.shape[1]:
        raise ValueError(f"router must be [experts, {x.shape[1]}] (the width of x), got shape {tuple(router.shape)}")
    check_device("router", router, "x", x)
    if offset is not None:
        _check_matrix("offset", offset, "[tokens, experts]")
        if offset.shape != (num_tokens, num_experts):
            raise ValueError(f"offset must be [{num_tokens}, {num_experts}], got shape {tuple(offset.shape)}")
        check_device("offset", offset, "x", x)
    _check_options(backend, "x", x, num_experts, top_k, normalize, statistics, token_mask)
    with without_autocast(x):
        routing = run_routing(x, router, top_k, offset=offset, normalize=normalize, backend=backend)
        return _counted(routing, statistics, token_mask)


def expert_order(experts: Tensor) -> Tensor:
    """Return the order that brings tokens with the same experts together: int32 [N], a permutation of 0..N-1.

    Sorts each window of 16,384 tokens, stably, by their two smallest experts (for k = 1 by the one), so that
    ``experts[order]`` has runs of equal experts. Deterministic; without gradient. Triton only: the other backends
    work on no tiles of tokens.

    Args:
        experts: [N, k], int64, int32, int16 or uint8; values in 0..255. A GPU does not read them back: with other
            values there the order is no permutation.

    Raises:
        TypeError: ``experts`` is no dense tensor of an integer dtype.
        ValueError: not of two dimensions, Triton cannot run where it is, or on the CPU (in Triton's interpreter) a
            value outside of 0..255.
    """
    check_tensor("experts", experts)
    if experts.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"experts must be int64, int32, int16 or uint8, got {experts.dtype}")
    if experts.dim() != 2 or experts.shape[1] == 0:
        raise ValueError(f"experts must be [tokens, top_k], got shape {tuple(experts.shape)}")
    resolve_backend("triton", "experts", experts.new_empty(0, dtype=torch.float32))  # asks where, not in which dtype
    return run_expert_order(experts)


def _counted(routing: Routing, statistics: str | None, token_mask: Tensor | None) -> Routing:
    """The routing with its statistics, if any are asked for."""
    if statistics is None:
        return routing
    tokens, sums = reference.count(routing.logits, routing.expert_ids, statistics, token_mask)
    return routing._replace(tokens_per_expert=tokens, probability_sums=sums)


def _check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    check_floats(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(tensor.shape)}; flatten the batch first")


def _check_statistics(statistics: object) -> None:
    """`ValueError` for what names no statistics."""
    if statistics is not None and not (isinstance(statistics, str) and statistics in STATISTICS):
        raise ValueError(f"unknown statistics {shown(statistics)}; expected None, 'topk' or 'full'")


def _check_token_mask(token_mask: Tensor, name: str, main: Tensor) -> None:
    """`TypeError` or `ValueError` for a mask that does not say of each of ``main``'s tokens whether it counts."""
    check_tensor("token_mask", token_mask)
    if token_mask.shape != main.shape[:1]:
        raise ValueError(f"token_mask must be [{main.shape[0]}], got shape {tuple(token_mask.shape)}")
    if token_mask.dtype != torch.bool and token_mask.dtype not in INTEGER_DTYPES:
        raise TypeError(f"token_mask must be bool or integers, zero for padding, got {token_mask.dtype}")
    check_device("token_mask", token_mask, name, main)


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
    if backend == "triton" and num_experts > MAX_EXPERTS:
        raise ValueError(
            f"{num_experts} experts: the Triton kernels route up to {MAX_EXPERTS}; use fewer or backend='torch'"
        )
    _check_statistics(statistics)
    if token_mask is not None:
        _check_token_mask(token_mask, name, main)
