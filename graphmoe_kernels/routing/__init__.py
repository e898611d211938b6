"""Top-k softmax routing: which experts a token goes to, how strongly, and how evenly experts are used."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.backend import resolve_backend, without_autocast
from graphmoe_kernels.routing import reference
from graphmoe_kernels.routing.launch import MAX_EXPERTS
from graphmoe_kernels.routing.op import route_op
from graphmoe_kernels.routing.operands import Routing as Routing
from graphmoe_kernels.routing.order import expert_order as expert_order
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
    """Softmax over the experts, the ``top_k`` largest, optionally renormalised (GraphMoE, section 3 and Eq. 4).

    A row with NaN, +inf or nothing but -inf gets NaN weights and experts that are still valid, distinct indices.
    Among equal logits Triton chooses the lower index; the other backends choose any.

    Args:
        logits: [N, n], fp64, fp32, fp16 or bf16; the softmax runs in fp32 at least.
        top_k: experts a token, 1 <= top_k <= n.
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
        if backend == "triton":
            return _triton(None, None, logits, top_k, normalize, statistics, token_mask)
        return _plain(logits, top_k, normalize, statistics, token_mask)


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
    """`topk_softmax_routing` of the logits ``offset + x router^T`` (GraphMoE, Eq. 4), which run in fp32 at least.

    With Triton product, routing and statistics are one kernel, and half-precision ``x`` is not copied to fp32.

    Args:
        x: [N, D] token states, of a dtype as above, like ``router`` and ``offset``.
        router: [n, D].
        top_k: experts a token, 1 <= top_k <= n.
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
        if backend == "triton":
            return _triton(x, router, offset, top_k, normalize, statistics, token_mask)
        return _plain(reference.project(x, router, offset), top_k, normalize, statistics, token_mask)


def _triton(
    x: Tensor | None,
    router: Tensor | None,
    offset: Tensor | None,
    top_k: int,
    normalize: bool,
    statistics: str | None,
    token_mask: Tensor | None,
) -> Routing:
    logits, weights, experts, counts, mass, tickets = route_op(
        x, router, offset, token_mask, top_k, normalize, statistics
    )
    if x is None and offset is not None and offset.dtype == torch.float32:
        logits = offset
    if statistics is None:
        counts = mass = None
    return Routing(weights, experts, counts, mass, logits, tickets)


def _plain(logits: Tensor, top_k: int, normalize: bool, statistics: str | None, token_mask: Tensor | None) -> Routing:
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    found = reference.route(logits, top_k, normalize, statistics, token_mask)
    return Routing(*found, logits, torch.empty(0, dtype=torch.int32, device=logits.device))


def _check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    check_floats(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(tensor.shape)}; flatten the batch first")


def check_statistics(statistics: object) -> None:
    """`ValueError` for what names no statistics."""
    if statistics is not None and not (isinstance(statistics, str) and statistics in STATISTICS):
        raise ValueError(f"unknown statistics {shown(statistics)}; expected None, 'topk' or 'full'")


def check_token_mask(token_mask: Tensor, name: str, main: Tensor) -> None:
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
    check_statistics(statistics)
    if token_mask is not None:
        check_token_mask(token_mask, name, main)
