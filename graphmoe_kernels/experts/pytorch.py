"""The expert SwiGLU round as it runs on PyTorch: pairs of token and slot, a run of them at a time, nothing wide saved.

A pair's products are those with its own expert (`graphmoe_kernels.experts.pytorch_pairs`), and the pointwise work is
done for all pairs of a run at once: the cost hardly grows with the number of experts. On a CPU a run's wide tensors
stay in cache. (One tensor of all pairs costs a CPU more in memory traffic and page faults than the arithmetic on it.)
Other devices have one run. Backward recomputes the pre-activation.

Half-precision inputs are computed in fp32 within a block of tokens and rounded once on the way out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.activations import Activation, get_activation
from graphmoe_kernels.experts import pytorch_few
from graphmoe_kernels.experts.dropout import kept_scale
from graphmoe_kernels.experts.operands import FLOATING, ExpertOperands, GateUp
from graphmoe_kernels.experts.pytorch_blocks import add_update_gradients, compute_dtype, scratch_on_host
from graphmoe_kernels.experts.pytorch_pairs import pairs_of
from graphmoe_kernels.experts.pytorch_protocols import Pairs, Run
from graphmoe_kernels.structures import cast_tensor


class Matrices(NamedTuple):
    """B of gate and up, transposed, and A of down, [n, r, F] each, in the dtype of the computation."""

    gate_B: Tensor
    up_B: Tensor
    down_A: Tensor


class Given(NamedTuple):
    """What every run reads; ``low`` are the low-rank activations of all pairs, [P, q] each."""

    operands: ExpertOperands
    pairs: Pairs
    matrices: Matrices
    low: GateUp
    scale: float
    act: Activation


class Upstream(NamedTuple):
    """The gradients of all pairs' z, [P, q], without and with the routing weights."""

    dz: Tensor
    weighted: Tensor


class Gradients(NamedTuple):
    """What runs write, or add to: gradients by name, of the matrices, and of all pairs' ``low`` and weights."""

    named: dict[str, Tensor]
    matrices: Matrices
    low: GateUp
    weights: Tensor


def forward(operands: ExpertOperands, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """hidden [N, F] and low_down [N, n*r]; see `graphmoe_kernels.expert_swiglu`."""
    if pytorch_few.suits(operands):
        return pytorch_few.forward(operands, scale, activation)
    given = _given(operands, _matrices(operands), scale, activation)
    pairs, down_A = given.pairs, given.matrices.down_A
    hidden = torch.empty_like(operands.pre_activations.gate, memory_format=torch.contiguous_format)
    low_down = operands.low.new_zeros(operands.low.shape[0], operands.low.shape[1] // 2)
    narrow = pairs.weights.new_empty(pairs.weights.shape[0], pairs.rank)  # [P, q]
    for span, runs in pairs.blocks():
        base, total = _base(given, span), pairs.total("hidden", hidden[span])
        for run in runs:
            g, u = _finished(operands, run, _pre_activation(given, base, run))
            own = torch.mul(given.act.function(g), u, out=u)  # [m, F]
            dropped = own if run.mask is None else torch.mul(own, run.mask, out=run.wide("dropped"))
            run.reduce(dropped, down_A, narrow[run.rows])
            run.add_to(total, own.mul_(pairs.weights[run.rows]))
        _store(total, hidden[span])
    pairs.put(narrow.mul_(pairs.weights).mul_(_kept(operands)), low_down)
    return hidden, low_down


def backward(
    grad_hidden: Tensor,
    grad_low_down: Tensor,
    operands: ExpertOperands,
    scale: float,
    activation: str,
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """The gradient of every floating operand by its name in `FLOATING`; recomputes each run's pre-activation.

    All are computed together, so that those not ``needed`` would save nothing.
    """
    # In memory of this form products with few columns take a fraction of the time.
    matrices = Matrices(*(x.contiguous() for x in _matrices(operands)))
    given = _given(operands, matrices, scale, activation)
    pairs, grads = given.pairs, _new_gradients(operands)
    dz = pairs.take(grad_low_down).mul_(_kept(operands))
    upstream = Upstream(dz, dz * pairs.weights)
    found = Gradients(
        grads,
        Matrices(*(torch.zeros_like(x) for x in matrices)),
        GateUp(*(torch.empty_like(x) for x in given.low)),
        torch.empty_like(pairs.weights),
    )
    for span, runs in pairs.blocks():
        base, d_hidden = _base(given, span), grad_hidden[span]
        totals = GateUp(*(pairs.total(name, grads[name][span]) for name in ("gate", "up")))
        for run in runs:
            for total, d in zip(totals, _run_backward(given, base, run, d_hidden, upstream, found), strict=True):
                run.add_to(total, d)
        if operands.update is not None:
            add_update_gradients(grads, *totals, operands.update, span)
        for total, name in zip(totals, ("gate", "up"), strict=True):
            _store(total, grads[name][span])
    for part, of_low in enumerate(found.low):
        pairs.put(of_low.mul_(scale), grads["low"], part)
    of = found.matrices
    grads |= {"gate_B": of.gate_B.mT, "up_B": of.up_B.mT, "down_A": of.down_A}
    grads["routing_weights"] = pairs.by_slot(found.weights)
    if operands.low_update is not None:
        grads["low_update"] = grads["low"].clone()
    return grads


def _matrices(operands: ExpertOperands) -> Matrices:
    dtype = compute_dtype(operands.low.dtype)
    return Matrices(*(cast_tensor(x, dtype) for x in (operands.B.gate.mT, operands.B.up.mT, operands.down_A)))


def _given(operands: ExpertOperands, matrices: Matrices, scale: float, activation: str) -> Given:
    low, pairs = operands.low, pairs_of(operands)
    if operands.low_update is not None:
        low = low + operands.low_update
    taken = GateUp(pairs.take(low), pairs.take(low, 1))
    return Given(operands, pairs, matrices, taken, scale, get_activation(activation))


def _base(given: Given, span: slice) -> GateUp:
    """The pre-activations [b, F] of a block's tokens, the update in them, without the experts' part."""
    pre_activations, update = given.operands.pre_activations, given.operands.update
    gate, up = (x[span] for x in pre_activations)
    if update is None:
        return GateUp(gate, up)
    state = update.state[span]
    return GateUp(
        torch.addmm(gate, state, update.gate.t(), out=scratch_on_host("base_gate", gate)),
        torch.addmm(up, state, update.up.t(), out=scratch_on_host("base_up", up)),
    )


def _pre_activation(given: Given, base: GateUp, run: Run) -> GateUp:
    """Base plus s B (A x) of a run's pairs, [m, F] each."""
    B = GateUp(given.matrices.gate_B, given.matrices.up_B)
    return GateUp(
        *(
            run.add_product(run.spread(x, name), low[run.rows], matrices, given.scale)
            for name, x, low, matrices in zip("gu", base, given.low, B, strict=True)
        )
    )


def _finished(operands: ExpertOperands, run: Run, pre: GateUp) -> GateUp:
    """g and u [m, F] times their expert's scale vectors, and the biases."""
    g, u = pre
    if operands.scales is not None:
        g, u = (run.scaled(x, cast_tensor(m, x.dtype)) for x, m in zip(pre, operands.scales, strict=True))
    if operands.biases is not None:
        g, u = g + cast_tensor(operands.biases.gate, g.dtype), u + cast_tensor(operands.biases.up, u.dtype)
    return GateUp(g, u)


def _kept(operands: ExpertOperands) -> float:
    """What entries that dropout keeps are multiplied with."""
    return 1.0 if operands.dropout is None else kept_scale(operands.dropout.rate)


def _store(total: Tensor, out: Tensor) -> None:
    """Round what runs have added up, where it is not in its place already."""
    if total.dtype is not out.dtype:
        out.copy_(total)


def _new_gradients(operands: ExpertOperands) -> dict[str, Tensor]:
    """Memory for the gradients of what is no expert's matrix: zeros for sums, and for low-rank activations.

    Sums over tokens are in the dtype of the computation.
    """
    dtype = compute_dtype(operands.low.dtype)
    found = {}
    for name, x in zip(FLOATING, operands.floating(), strict=True):
        if x is None:
            continue
        if name in ("gate", "up", "state"):
            found[name] = torch.empty_like(x, memory_format=torch.contiguous_format)
        elif name == "low":
            found[name] = torch.zeros_like(x, memory_format=torch.contiguous_format)
        elif name in ("fold_gate", "fold_up", "gate_scale", "up_scale"):
            found[name] = torch.zeros(x.shape, dtype=dtype, device=x.device)
    return found


def _run_backward(
    given: Given, base: GateUp, run: Run, grad_hidden: Tensor, upstream: Upstream, found: Gradients
) -> GateUp:
    """Add one run's part to what is ``found``; return the gradients of its pre-activations, [m, F] each.

    Args:
        base, grad_hidden: [b, F], of the run's block.
    """
    operands, matrices, rows = given.operands, given.matrices, run.rows
    pre = _pre_activation(given, base, run)
    g, u = _finished(operands, run, pre)
    active, slope = given.act.with_derivative(g)
    own = torch.mul(active, u, out=run.wide("own"))  # [m, F]
    d_own = run.spread(grad_hidden, "d_own")
    if run.mask is None:
        run.add_product(d_own, upstream.dz[rows], matrices.down_A, 1.0)
    else:
        d_own.addcmul_(run.product(upstream.dz[rows], matrices.down_A), run.mask)
    torch.sum(torch.mul(own, d_own, out=run.wide("product")), 1, keepdim=True, out=found.weights[rows])
    if run.mask is not None:
        own.mul_(run.mask)
    run.add_gradient(found.matrices.down_A, upstream.weighted[rows], own)
    d_own.mul_(given.pairs.weights[rows])
    d_up = active.mul_(d_own)
    d_gate = slope.mul_(d_own.mul_(u))
    if operands.scales is not None:
        of_scales = found.named["gate_scale"], found.named["up_scale"]
        for d, x, of_vectors in zip((d_gate, d_up), pre, of_scales, strict=True):
            run.add_vector_gradient(of_vectors, d * x)
        d_gate, d_up = (
            run.scaled(d, cast_tensor(m, d.dtype)) for d, m in zip((d_gate, d_up), operands.scales, strict=True)
        )
    for d, B, d_B, low, d_low in (
        (d_gate, matrices.gate_B, found.matrices.gate_B, given.low.gate, found.low.gate),
        (d_up, matrices.up_B, found.matrices.up_B, given.low.up, found.low.up),
    ):
        run.add_gradient(d_B, low[rows], d, given.scale)
        run.reduce(d, B, d_low[rows])
    return GateUp(d_gate, d_up)
