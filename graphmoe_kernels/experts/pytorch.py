"""The expert SwiGLU round as it runs on PyTorch: blocks of tokens, grouped by expert, nothing wide saved.

Tokens are taken in blocks whose (token, slot) pairs are sorted by expert, and each chosen expert works on its own rows:
the cost does not grow with the number of experts, and the wide intermediates of one expert's rows stay in cache and in
memory that the allocator hands out again at once. (A fresh tensor of some megabytes costs a CPU more in page faults
than pointwise arithmetic on it.) Backward recomputes the pre-activation.

Half-precision inputs are computed in fp32 within a block and rounded once on the way out.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.experts import pytorch_few
from graphmoe_kernels.experts.dropout import dropout_mask
from graphmoe_kernels.experts.ids import expert_bounds
from graphmoe_kernels.experts.operands import FLOATING, ExpertOperands
from graphmoe_kernels.experts.pytorch_blocks import add_update_gradients, blocks, compute_dtype, updated


class Rows(NamedTuple):
    """The pairs of one block that chose one expert: the expert, and where they stand among the sorted pairs."""

    expert: int
    span: slice


class PreActivation(NamedTuple):
    """g and u [m, F] of one expert's rows before its scale vectors, and the low-rank activations [m, r] in them."""

    g: Tensor
    u: Tensor
    low_gate: Tensor
    low_up: Tensor


class Block:
    """One block of b tokens with its p = b * k (token, slot) pairs sorted by expert.

    Attributes:
        tokens: the block's slice of the batch.
        gate, up, low: [b, F], [b, F], [b, 2nr], the block's activations with a later round's update in them.
        order: [p], the sorted pairs as indices into [b * k].
        token: [p], each sorted pair's token, counted from the block's start.
        position: [b, k], where a token's slots stand among the sorted pairs.
        rows: one `Rows` for every expert that somebody chose.
        weights: [p, 1], each sorted pair's routing weight.
        biases: gate_bias and up_bias [F], or None.
        mask: [b * k, F] dropout mask in token order, or None.
    """

    def __init__(self, operands: ExpertOperands, tokens: slice, scale: float) -> None:
        self.operands, self.tokens, self.scale = operands, tokens, scale
        self.dtype, width = compute_dtype(operands.low.dtype), operands.down_A.shape[2]
        chosen = operands.expert_ids[tokens]  # [b, k]
        flat = chosen.reshape(-1)
        self.order = torch.argsort(flat, stable=True)
        self.token = self.order // chosen.shape[1]
        self.position = torch.argsort(self.order).view_as(chosen)
        bounds = expert_bounds(flat[self.order], chosen, operands.down_A.shape[0])
        self.rows = [
            Rows(e, slice(start, stop)) for e, (start, stop) in enumerate(itertools.pairwise(bounds)) if stop > start
        ]
        self.weights = operands.routing_weights[tokens].reshape(-1, 1)[self.order].to(self.dtype)
        self.biases = None if operands.biases is None else [b.to(self.dtype) for b in operands.biases]
        self.mask: Tensor | None = None
        if operands.dropout is not None:
            rate, seed = operands.dropout
            mask = dropout_mask(seed.to(flat.device), rate, tokens.start, chosen, width)
            self.mask = mask.to(self.dtype).flatten(0, 1)
        self.gate, self.up = updated(operands.pre_activations, operands.update, tokens)
        self.low = operands.low[tokens]
        if operands.low_update is not None:
            self.low = self.low + operands.low_update[tokens]

    def own(self, x: Tensor, rows: Rows) -> Tensor:
        """The rows' own lines of x [b, ...], in the dtype of the computation: [m, ...]."""
        return x.index_select(0, self.token[rows.span]).to(self.dtype)

    def columns(self, rows: Rows, up: bool = False) -> slice:
        """Where the rows' expert stands in an [N, n*r] tensor, or in the second half of an [N, 2nr] one (``up``)."""
        n, rank, _ = self.operands.down_A.shape
        start = (rows.expert + n * up) * rank
        return slice(start, start + rank)

    def pre_activation(self, rows: Rows) -> PreActivation:
        """Base plus update plus s B (A x) of one expert's rows."""
        B, e = self.operands.B, rows.expert
        low_gate = self.own(self.low[:, self.columns(rows)], rows)
        low_up = self.own(self.low[:, self.columns(rows, up=True)], rows)
        g, u = self.own(self.gate, rows), self.own(self.up, rows)
        g.addmm_(low_gate, B.gate[e].to(self.dtype).T, alpha=self.scale)
        u.addmm_(low_up, B.up[e].to(self.dtype).T, alpha=self.scale)
        return PreActivation(g, u, low_gate, low_up)

    def scaled(self, pre: PreActivation, rows: Rows) -> tuple[Tensor, Tensor]:
        """g and u times their expert's scale vectors, and the biases."""
        g, u = pre.g, pre.u
        if self.operands.scales is not None:
            for_gate, for_up = self.operands.scales
            g, u = g * for_gate[rows.expert].to(self.dtype), u * for_up[rows.expert].to(self.dtype)
        if self.biases is not None:
            g, u = g + self.biases[0], u + self.biases[1]
        return g, u

    def drop(self, x: Tensor, rows: Rows) -> Tensor:
        """x [m, F] with the rows' dropout mask on it; x itself without dropout."""
        return x if self.mask is None else x * self.mask[self.order[rows.span]]

    def combine(self, x: Tensor, weighted: bool = False) -> Tensor:
        """The sum over each token's slots of x [p, F], times the routing weights if asked for: [b, F]."""
        weights = self.weights[self.position].squeeze(-1) if weighted else None
        return F.embedding_bag(self.position, x, mode="sum", per_sample_weights=weights)

    def scatter(self, x: Tensor, rows: Rows, out: Tensor, up: bool = False) -> None:
        """Write x [m, r] to the rows' tokens and their expert's `columns` of ``out``."""
        out[self.tokens, self.columns(rows, up)].index_copy_(0, self.token[rows.span], x.to(out.dtype))


def forward(operands: ExpertOperands, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """hidden [N, F] and low_down [N, n*r]; see `graphmoe_kernels.expert_swiglu`."""
    if pytorch_few.suits(operands):
        return pytorch_few.forward(operands, scale, activation)
    act = get_activation(activation).function
    gate = operands.pre_activations.gate
    hidden = torch.empty_like(gate, memory_format=torch.contiguous_format)
    low_down = operands.low.new_zeros(operands.low.shape[0], operands.low.shape[1] // 2)
    for span in blocks(gate, operands.expert_ids.shape[1]):
        block = Block(operands, span, scale)
        wide = hidden.new_empty(block.order.numel(), hidden.shape[1], dtype=block.dtype)  # [p, F]
        for rows in block.rows:
            g, u = block.scaled(block.pre_activation(rows), rows)
            own = act(g).mul_(u)  # [m, F]
            narrow = block.drop(own, rows) @ operands.down_A[rows.expert].to(block.dtype).T  # [m, r]
            block.scatter(narrow.mul_(block.weights[rows.span]), rows, low_down)
            wide[rows.span] = own
        hidden[span] = block.combine(wide, weighted=True)
    return hidden, low_down


def _new_gradients(operands: ExpertOperands) -> dict[str, Tensor]:
    """Zeros for every floating operand; sums over tokens are in the dtype of the computation."""
    dtype = compute_dtype(operands.pre_activations.gate.dtype)
    by_token = ("gate", "up", "state", "low", "low_update", "routing_weights")
    return {
        name: torch.zeros(x.shape, dtype=x.dtype if name in by_token else dtype, device=x.device)
        for name, x in zip(FLOATING, operands.floating(), strict=True)
        if x is not None
    }


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
    for span in blocks(operands.pre_activations.gate, operands.expert_ids.shape[1]):
        block = Block(operands, span, scale)
        d_gate, d_up = _block_backward(block, activation, grad_hidden[span], grad_low_down[span], grads)
        grads["gate"][span], grads["up"][span] = d_gate, d_up
        if operands.update is not None:
            add_update_gradients(grads, d_gate, d_up, operands.update, span)
    if operands.low_update is not None:
        grads["low_update"] = grads["low"].clone()
    return grads


def _block_backward(
    block: Block, activation: str, grad_hidden: Tensor, grad_low_down: Tensor, grads: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Adds one block's part to ``grads``; returns the gradients of its gate and up pre-activations, [b, F] each."""
    act = get_activation(activation)
    operands, pairs = block.operands, block.order.numel()
    d_gate, d_up = grad_hidden.new_empty(2, pairs, grad_hidden.shape[1], dtype=block.dtype)  # [p, F] each
    d_weights = torch.empty_like(block.weights)
    for rows in block.rows:
        e, span, w = rows.expert, rows.span, block.weights[rows.span]
        pre = block.pre_activation(rows)
        g, u = block.scaled(pre, rows)
        active = act.function(g)
        own = active * u  # [m, F]
        dz = block.own(grad_low_down[:, block.columns(rows)], rows)  # [m, r]
        d_own = block.drop(dz @ operands.down_A[e].to(block.dtype), rows).add_(block.own(grad_hidden, rows))  # [m, F]
        grads["down_A"][e].addmm_((dz * w).T, block.drop(own, rows))
        d_weights[span, 0] = torch.linalg.vecdot(own, d_own)
        d_own.mul_(w)
        torch.mul(act.derivative(g).mul_(d_own), u, out=d_gate[span])
        torch.mul(d_own, active, out=d_up[span])
        if operands.scales is not None:
            of_scales = grads["gate_scale"], grads["up_scale"]
            for d, x, vector, d_vector in zip((d_gate, d_up), pre[:2], operands.scales, of_scales, strict=True):
                d_vector[e].add_(torch.linalg.vecdot(d[span], x, dim=0))
                d[span].mul_(vector[e].to(d.dtype))
        for d, B, d_B, low, up in (
            (d_gate[span], operands.B.gate, grads["gate_B"], pre.low_gate, False),
            (d_up[span], operands.B.up, grads["up_B"], pre.low_up, True),
        ):
            d_B[e].addmm_(d.T, low, alpha=block.scale)
            block.scatter((d @ B[e].to(block.dtype)).mul_(block.scale), rows, grads["low"], up)
    of_weights = grads["routing_weights"]
    of_weights[block.tokens] = d_weights[block.position].squeeze(-1).to(of_weights.dtype)
    return block.combine(d_gate), block.combine(d_up)
