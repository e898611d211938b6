"""The expert SwiGLU round as it runs on PyTorch: blocks of tokens, grouped by expert, nothing wide saved.

Tokens are taken in blocks whose (token, slot) pairs are sorted by expert, and each chosen expert works on its own rows:
the cost does not grow with the number of experts, and the wide intermediates of one expert's rows stay in cache and in
memory that the allocator hands out again at once. (A fresh tensor of some megabytes costs a CPU more in page faults
than pointwise arithmetic on it.) Backward recomputes the pre-activation.

Half-precision inputs are computed in fp32 within a block and rounded once on the way out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.experts.dropout import dropout_mask
from graphmoe_kernels.experts.ids import expert_bounds
from graphmoe_kernels.experts.operands import FLOATING, Inputs, Settings

# Bytes of one block's wide intermediate [tokens * k, 2F] in the dtype of the computation. Measured on a 2-core CPU with
# F = 5632, at 256 and at 1024 tokens: an eighth of it costs about twice the time, twice of it gains nothing.
BLOCK_BYTES = 12 * 2**20
MIN_BLOCK_TOKENS = 16


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a block is computed: fp32 for half precision, the input's own otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def blocks(inputs: Inputs) -> Iterator[slice]:
    """Slices of tokens, as even as can be, whose wide intermediate takes at most about `BLOCK_BYTES`."""
    tokens, width = inputs.gate.shape
    token_bytes = inputs.experts.shape[1] * 2 * width * compute_dtype(inputs.gate.dtype).itemsize
    largest = max(MIN_BLOCK_TOKENS, BLOCK_BYTES // token_bytes)
    size = max(1, math.ceil(tokens / max(1, math.ceil(tokens / largest))))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


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

    def __init__(self, inputs: Inputs, tokens: slice, settings: Settings) -> None:
        self.inputs, self.tokens, self.scale = inputs, tokens, settings.scale
        self.dtype = compute_dtype(inputs.gate.dtype)
        chosen = inputs.experts[tokens]  # [b, k]
        flat = chosen.reshape(-1)
        self.order = torch.argsort(flat, stable=True)
        self.token = self.order // chosen.shape[1]
        self.position = torch.argsort(self.order).view_as(chosen)
        bounds = expert_bounds(flat[self.order], chosen, inputs.gate_B.shape[0])
        self.rows = [
            Rows(e, slice(start, stop)) for e, (start, stop) in enumerate(itertools.pairwise(bounds)) if stop > start
        ]
        self.weights = inputs.weights[tokens].reshape(-1, 1)[self.order].to(self.dtype)
        self.biases = None if settings.biases is None else [b.to(self.dtype) for b in settings.biases]
        self.mask: Tensor | None = None
        if settings.dropout > 0 and settings.seed is not None:
            seed = settings.seed.to(flat.device)
            mask = dropout_mask(seed, settings.dropout, tokens.start, chosen, inputs.gate.shape[1])
            self.mask = mask.to(self.dtype).flatten(0, 1)
        self.gate, self.up, self.low = inputs.gate[tokens], inputs.up[tokens], inputs.low[tokens]
        if inputs.update is not None:
            state, fold_gate, fold_up = inputs.update
            self.gate = torch.addmm(self.gate, state[tokens], fold_gate.T)
            self.up = torch.addmm(self.up, state[tokens], fold_up.T)
        if inputs.low_update is not None:
            self.low = self.low + inputs.low_update[tokens]

    def own(self, x: Tensor, rows: Rows) -> Tensor:
        """The rows' own lines of x [b, ...], in the dtype of the computation: [m, ...]."""
        return x.index_select(0, self.token[rows.span]).to(self.dtype)

    def columns(self, rows: Rows, up: bool = False) -> slice:
        """Where the rows' expert stands in an [N, n*r] tensor, or in the second half of an [N, 2nr] one (``up``)."""
        n, rank, _ = self.inputs.down_A.shape
        start = (rows.expert + n * up) * rank
        return slice(start, start + rank)

    def pre_activation(self, rows: Rows) -> PreActivation:
        """Base plus update plus s B (A x) of one expert's rows."""
        inputs, e = self.inputs, rows.expert
        low_gate = self.own(self.low[:, self.columns(rows)], rows)
        low_up = self.own(self.low[:, self.columns(rows, up=True)], rows)
        g, u = self.own(self.gate, rows), self.own(self.up, rows)
        g.addmm_(low_gate, inputs.gate_B[e].to(self.dtype).T, alpha=self.scale)
        u.addmm_(low_up, inputs.up_B[e].to(self.dtype).T, alpha=self.scale)
        return PreActivation(g, u, low_gate, low_up)

    def scaled(self, pre: PreActivation, rows: Rows) -> tuple[Tensor, Tensor]:
        """g and u times their expert's scale vectors, and the biases."""
        g, u = pre.g, pre.u
        if self.inputs.scales is not None:
            gate_scale, up_scale = self.inputs.scales
            g, u = g * gate_scale[rows.expert].to(self.dtype), u * up_scale[rows.expert].to(self.dtype)
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


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """c [N, F] and z [N, n*r]; see `graphmoe_kernels.expert_swiglu`."""
    act = get_activation(settings.activation).function
    c = torch.empty_like(inputs.gate, memory_format=torch.contiguous_format)
    z = inputs.low.new_zeros(inputs.low.shape[0], inputs.low.shape[1] // 2)
    for span in blocks(inputs):
        block = Block(inputs, span, settings)
        hidden = c.new_empty(block.order.numel(), c.shape[1], dtype=block.dtype)  # [p, F]
        for rows in block.rows:
            g, u = block.scaled(block.pre_activation(rows), rows)
            own = act(g).mul_(u)  # [m, F]
            narrow = block.drop(own, rows) @ inputs.down_A[rows.expert].to(block.dtype).T  # [m, r]
            block.scatter(narrow.mul_(block.weights[rows.span]), rows, z)
            hidden[rows.span] = own
        c[span] = block.combine(hidden, weighted=True)
    return c, z


def _new_gradients(inputs: Inputs) -> Inputs:
    """Zeros in the place of every input; sums over tokens are in the dtype of the computation."""
    dtype = compute_dtype(inputs.gate.dtype)

    def zeros(name: str, x: Tensor) -> Tensor:
        summed = name not in ("gate", "up", "state", "low", "low_update", "weights")
        return torch.zeros(x.shape, dtype=dtype if summed else x.dtype, device=x.device)

    given = {name: x for name, x in inputs._asdict().items() if name in FLOATING and x is not None}
    return inputs._replace(**{name: zeros(name, x) for name, x in given.items()})


def backward(grad_c: Tensor, grad_z: Tensor, inputs: Inputs, settings: Settings, needed: list[bool]) -> Inputs:
    """The gradient of every floating input, in its place in `Inputs`; recomputes each block's pre-activation.

    All are computed together, so that those not ``needed`` would save nothing.
    """
    grads = _new_gradients(inputs)
    for span in blocks(inputs):
        block = Block(inputs, span, settings)
        d_gate, d_up = _block_backward(block, settings.activation, grad_c[span], grad_z[span], grads)
        grads.gate[span], grads.up[span] = d_gate, d_up
        if inputs.update is not None and grads.update is not None:
            state, fold_gate, fold_up = (t.to(block.dtype) for t in inputs.update)
            d_state, d_fold_gate, d_fold_up = grads.update
            d_state[span] = torch.addmm(d_gate @ fold_gate, d_up, fold_up)
            d_fold_gate.addmm_(d_gate.T, state[span])
            d_fold_up.addmm_(d_up.T, state[span])
    if inputs.low_update is not None:
        grads = grads._replace(low_update=grads.low.clone())
    return grads


def _block_backward(
    block: Block, activation: str, grad_c: Tensor, grad_z: Tensor, grads: Inputs
) -> tuple[Tensor, Tensor]:
    """Adds one block's part to ``grads``; returns the gradients of its gate and up pre-activations, [b, F] each."""
    act = get_activation(activation)
    inputs, pairs = block.inputs, block.order.numel()
    d_gate, d_up = grad_c.new_empty(2, pairs, grad_c.shape[1], dtype=block.dtype)  # [p, F] each
    d_weights = torch.empty_like(block.weights)
    for rows in block.rows:
        e, span, w = rows.expert, rows.span, block.weights[rows.span]
        pre = block.pre_activation(rows)
        g, u = block.scaled(pre, rows)
        active = act.function(g)
        hidden = active * u  # [m, F]
        dz = block.own(grad_z[:, block.columns(rows)], rows)  # [m, r]
        d_hidden = block.drop(dz @ inputs.down_A[e].to(block.dtype), rows).add_(block.own(grad_c, rows))  # [m, F]
        grads.down_A[e].addmm_((dz * w).T, block.drop(hidden, rows))
        d_weights[span, 0] = torch.linalg.vecdot(hidden, d_hidden)
        d_hidden.mul_(w)
        torch.mul(act.derivative(g).mul_(d_hidden), u, out=d_gate[span])
        torch.mul(d_hidden, active, out=d_up[span])
        if inputs.scales is not None and grads.scales is not None:
            for d, x, vector, d_vector in zip((d_gate, d_up), pre[:2], inputs.scales, grads.scales, strict=True):
                d_vector[e].add_(torch.linalg.vecdot(d[span], x, dim=0))
                d[span].mul_(vector[e].to(d.dtype))
        for d, B, d_B, low, up in (
            (d_gate[span], inputs.gate_B, grads.gate_B, pre.low_gate, False),
            (d_up[span], inputs.up_B, grads.up_B, pre.low_up, True),
        ):
            d_B[e].addmm_(d.T, low, alpha=block.scale)
            block.scatter((d @ B[e].to(block.dtype)).mul_(block.scale), rows, grads.low, up)
    grads.weights[block.tokens] = d_weights[block.position].squeeze(-1).to(grads.weights.dtype)
    return block.combine(d_gate), block.combine(d_up)
