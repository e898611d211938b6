"""The expert SwiGLU round as it runs on PyTorch: pairs of token and slot, block by block, nothing wide saved.

A pair's products are those with its own expert (`graphmoe_kernels.experts.pytorch_pairs`), and the pointwise work is
done for all pairs of a block at once: the cost hardly grows with the number of experts. On a CPU a block's wide tensors
stay in cache and in memory that the allocator hands out again at once. (A fresh tensor of some megabytes costs a CPU
more in page faults than pointwise arithmetic on it.) Other devices have one block. Backward recomputes the
pre-activation.

Half-precision inputs are computed in fp32 within a block and rounded once on the way out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.experts import pytorch_few
from graphmoe_kernels.experts.dropout import kept_scale
from graphmoe_kernels.experts.operands import FLOATING, ExpertOperands
from graphmoe_kernels.experts.pytorch_blocks import add_update_gradients, compute_dtype
from graphmoe_kernels.experts.pytorch_pairs import Pairs, pairs_of
from graphmoe_kernels.structures import cast_tensor


class Matrices(NamedTuple):
    """B of gate and up, transposed, and A of down, [n, r, F] each, in the dtype of the computation."""

    gate_B: Tensor
    up_B: Tensor
    down_A: Tensor


class PreActivation(NamedTuple):
    """g and u [p, F] of a block's pairs before their scale vectors, and the low-rank activations [p, q] in them."""

    g: Tensor
    u: Tensor
    low_gate: Tensor
    low_up: Tensor


def forward(operands: ExpertOperands, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """hidden [N, F] and low_down [N, n*r]; see `graphmoe_kernels.expert_swiglu`."""
    if pytorch_few.suits(operands):
        return pytorch_few.forward(operands, scale, activation)
    act, matrices = get_activation(activation).function, _matrices(operands)
    hidden = torch.empty_like(operands.pre_activations.gate, memory_format=torch.contiguous_format)
    low_down = operands.low.new_zeros(operands.low.shape[0], operands.low.shape[1] // 2)
    for pairs in pairs_of(operands):
        g, u = _finished(operands, pairs, _pre_activation(operands, pairs, matrices, scale))
        own = torch.mul(act(g), u, out=u)  # [p, F]
        hidden[pairs.tokens] = pairs.combine(own, weighted=True)
        if pairs.mask is not None:
            own.mul_(pairs.mask)
        narrow = pairs.reduce(own, matrices.down_A).mul_(pairs.weights)  # [p, q]
        pairs.put(narrow.mul_(_kept(operands)), low_down[pairs.tokens])
    return hidden, low_down


def backward(
    grad_hidden: Tensor,
    grad_low_down: Tensor,
    operands: ExpertOperands,
    scale: float,
    activation: str,
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """The gradient of every floating operand by its name in `FLOATING`; recomputes each block's pre-activation.

    All are computed together, so that those not ``needed`` would save nothing.
    """
    grads = _new_gradients(operands)
    # In memory of this form products with few columns take a fraction of the time.
    matrices = Matrices(*(x.contiguous() for x in _matrices(operands)))
    of_matrices = Matrices(*(torch.zeros_like(x) for x in matrices))
    for pairs in pairs_of(operands):
        span = pairs.tokens
        upstream = grad_hidden[span], grad_low_down[span]
        d_gate, d_up = _block_backward(operands, pairs, matrices, scale, activation, *upstream, grads, of_matrices)
        grads["gate"][span], grads["up"][span] = d_gate, d_up
        if operands.update is not None:
            add_update_gradients(grads, d_gate, d_up, operands.update, span)
    grads |= {"gate_B": of_matrices.gate_B.mT, "up_B": of_matrices.up_B.mT, "down_A": of_matrices.down_A}
    if operands.low_update is not None:
        grads["low_update"] = grads["low"].clone()
    return grads


def _matrices(operands: ExpertOperands) -> Matrices:
    dtype = compute_dtype(operands.low.dtype)
    return Matrices(*(cast_tensor(x, dtype) for x in (operands.B.gate.mT, operands.B.up.mT, operands.down_A)))


def _pre_activation(operands: ExpertOperands, pairs: Pairs, matrices: Matrices, scale: float) -> PreActivation:
    """Base plus update plus s B (A x) of a block's pairs."""
    low = operands.low[pairs.tokens]
    if operands.low_update is not None:
        low = low + operands.low_update[pairs.tokens]
    low_gate, low_up = pairs.take(low), pairs.take(low, 1)
    found = []
    for part, (own_low, B) in enumerate(((low_gate, matrices.gate_B), (low_up, matrices.up_B))):
        x = pairs.spread(_base(operands, pairs, part), pairs.wide("gu"[part]))  # [p, F]
        found.append(pairs.add_product(x, own_low, B, scale))
    g, u = found
    return PreActivation(g, u, low_gate, low_up)


def _base(operands: ExpertOperands, pairs: Pairs, part: int) -> Tensor:
    """The pre-activation [b, F] of a block's tokens for gate or up, the update in it."""
    x = operands.pre_activations[part][pairs.tokens]
    if operands.update is None:
        return x
    state, *folds = operands.update
    out = pairs.wide("base")[: x.shape[0]] if x.dtype is pairs.weights.dtype else None
    return torch.addmm(x, state[pairs.tokens], folds[part].t(), out=out)


def _finished(operands: ExpertOperands, pairs: Pairs, pre: PreActivation) -> tuple[Tensor, Tensor]:
    """g and u [p, F] times their expert's scale vectors, and the biases."""
    g, u = pre.g, pre.u
    if operands.scales is not None:
        g, u = (pairs.scaled(x, cast_tensor(m, x.dtype)) for x, m in zip((g, u), operands.scales, strict=True))
    if operands.biases is not None:
        g, u = g + cast_tensor(operands.biases.gate, g.dtype), u + cast_tensor(operands.biases.up, u.dtype)
    return g, u


def _kept(operands: ExpertOperands) -> float:
    """What entries that dropout keeps are multiplied with."""
    return 1.0 if operands.dropout is None else kept_scale(operands.dropout.rate)


def _new_gradients(operands: ExpertOperands) -> dict[str, Tensor]:
    """Memory for the gradients of what is no expert's matrix: zeros for sums, and for low-rank activations.

    Sums over tokens are in the dtype of the computation.
    """
    dtype = compute_dtype(operands.low.dtype)
    found = {}
    for name, x in zip(FLOATING, operands.floating(), strict=True):
        if x is None:
            continue
        if name in ("gate", "up", "state", "routing_weights"):
            found[name] = torch.empty_like(x, memory_format=torch.contiguous_format)
        elif name == "low":
            found[name] = torch.zeros_like(x, memory_format=torch.contiguous_format)
        elif name in ("fold_gate", "fold_up", "gate_scale", "up_scale"):
            found[name] = torch.zeros(x.shape, dtype=dtype, device=x.device)
    return found


def _block_backward(
    operands: ExpertOperands,
    pairs: Pairs,
    matrices: Matrices,
    scale: float,
    activation: str,
    grad_hidden: Tensor,
    grad_low_down: Tensor,
    grads: dict[str, Tensor],
    of_matrices: Matrices,
) -> tuple[Tensor, Tensor]:
    """Adds one block's part to ``grads`` and ``of_matrices``; returns the gradients of its gate and up
    pre-activations, [b, F] each."""
    act, span = get_activation(activation), pairs.tokens
    pre = _pre_activation(operands, pairs, matrices, scale)
    g, u = _finished(operands, pairs, pre)
    active = act.function(g)
    own = torch.mul(active, u, out=pairs.wide("own"))  # [p, F]
    dz = pairs.take(grad_low_down).mul_(_kept(operands))  # [p, q]
    d_own = pairs.spread(grad_hidden, pairs.wide("d_own"))  # [p, F]
    if pairs.mask is None:
        pairs.add_product(d_own, dz, matrices.down_A)
    else:
        of_dropped = pairs.add_product(pairs.wide("of_dropped"), dz, matrices.down_A, keep=0)
        d_own.addcmul_(of_dropped, pairs.mask)
    grads["routing_weights"][span] = pairs.by_slot(torch.linalg.vecdot(own, d_own))
    if pairs.mask is not None:
        own.mul_(pairs.mask)
    pairs.add_gradient(of_matrices.down_A, dz * pairs.weights, own)
    d_own.mul_(pairs.weights)
    d_up = active.mul_(d_own)
    d_gate = act.derivative(g).mul_(d_own.mul_(u))
    if operands.scales is not None:
        of_scales = grads["gate_scale"], grads["up_scale"]
        for d, x, vectors, of_vectors in zip((d_gate, d_up), pre[:2], operands.scales, of_scales, strict=True):
            pairs.add_vector_gradient(of_vectors, d * x)
            d.copy_(pairs.scaled(d, cast_tensor(vectors, d.dtype)))
    for part, (d, B, d_B, low) in enumerate(
        (
            (d_gate, matrices.gate_B, of_matrices.gate_B, pre.low_gate),
            (d_up, matrices.up_B, of_matrices.up_B, pre.low_up),
        )
    ):
        pairs.add_gradient(d_B, low, d, scale)
        pairs.put(pairs.reduce(d, B).mul_(scale), grads["low"][span], part)
    return pairs.combine(d_gate), pairs.combine(d_up)
