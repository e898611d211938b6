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
from graphmoe_kernels.experts.reference import draw_dropout_mask, dropout_generator

# Bytes of one block's wide intermediate [tokens * k, 2F] in the dtype of the computation. Measured on a 2-core CPU with
# F = 5632, at 256 and at 1024 tokens: an eighth of it costs about twice the time, twice of it gains nothing.
BLOCK_BYTES = 12 * 2**20
MIN_BLOCK_TOKENS = 16


class Inputs(NamedTuple):
    """The operator's tensors under short names; shapes as in `graphmoe_kernels.expert_swiglu`."""

    gate: Tensor  # [N, F]
    up: Tensor  # [N, F]
    state: Tensor | None  # [N, G]
    fold_gate: Tensor | None  # [F, G]
    fold_up: Tensor | None  # [F, G]
    low_gate: Tensor  # [N, n*r]
    low_up: Tensor  # [N, n*r]
    gate_B: Tensor  # [n, F, r]
    up_B: Tensor  # [n, F, r]
    down_A: Tensor  # [n, r, F]
    weights: Tensor  # [N, k]
    experts: Tensor  # [N, k]

    @property
    def update(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """state, fold_gate and fold_up, which are there together or not at all."""
        if self.state is None or self.fold_gate is None or self.fold_up is None:
            return None
        return self.state, self.fold_gate, self.fold_up


class Settings(NamedTuple):
    """The operator's arguments that are no tensors, and the dropout's seed."""

    scale: float
    activation: str
    dropout: float
    seed: Tensor | None

    def generator(self) -> torch.Generator | None:
        """The stream of this call's dropout masks, or None without dropout."""
        return dropout_generator(self.seed) if self.dropout > 0 and self.seed is not None else None


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
    """g and u [m, F] of one expert's rows, and the low-rank activations [m, r] that went into them."""

    g: Tensor
    u: Tensor
    low_gate: Tensor
    low_up: Tensor


class Block:
    """One block of b tokens with its p = b * k (token, slot) pairs sorted by expert.

    Attributes:
        tokens: the block's slice of the batch.
        gate, up: [b, F], the block's pre-activations with a later round's update in them.
        order: [p], the sorted pairs as indices into [b * k].
        token: [p], each sorted pair's token, counted from the block's start.
        position: [b, k], where a token's slots stand among the sorted pairs.
        rows: one `Rows` for every expert that somebody chose.
        weights: [p, 1], each sorted pair's routing weight.
        mask: [b * k, F] dropout mask in token order, or None.
    """

    def __init__(self, inputs: Inputs, tokens: slice, settings: Settings, generator: torch.Generator | None) -> None:
        self.inputs, self.tokens, self.scale = inputs, tokens, settings.scale
        self.dtype = compute_dtype(inputs.gate.dtype)
        chosen = inputs.experts[tokens]  # [b, k]
        flat = chosen.reshape(-1)
        self.order = torch.argsort(flat, stable=True)
        self.token = self.order // chosen.shape[1]
        self.position = torch.argsort(self.order).view_as(chosen)
        counts = torch.bincount(flat, minlength=inputs.gate_B.shape[0]).tolist()
        stops = itertools.accumulate(counts)
        self.rows = [Rows(e, slice(stop - m, stop)) for e, (m, stop) in enumerate(zip(counts, stops, strict=True)) if m]
        self.weights = inputs.weights[tokens].reshape(-1, 1)[self.order].to(self.dtype)
        self.mask: Tensor | None = None
        if generator is not None:
            drawn = draw_dropout_mask(generator, settings.dropout, (*chosen.shape, inputs.gate.shape[1]))
            self.mask = drawn.to(flat.device, self.dtype).flatten(0, 1)
        self.gate, self.up = inputs.gate[tokens], inputs.up[tokens]
        if inputs.update is not None:
            state, fold_gate, fold_up = inputs.update
            self.gate = torch.addmm(self.gate, state[tokens], fold_gate.T)
            self.up = torch.addmm(self.up, state[tokens], fold_up.T)

    def own(self, x: Tensor, rows: Rows) -> Tensor:
        """The rows' own lines of x [b, ...], in the dtype of the computation: [m, ...]."""
        return x.index_select(0, self.token[rows.span]).to(self.dtype)

    def columns(self, rows: Rows) -> slice:
        """Where the rows' expert stands in an [N, n*r] tensor."""
        rank = self.inputs.down_A.shape[1]
        return slice(rows.expert * rank, (rows.expert + 1) * rank)

    def pre_activation(self, rows: Rows) -> PreActivation:
        """Base plus update plus s B (A x) of one expert's rows."""
        inputs, e, columns = self.inputs, rows.expert, self.columns(rows)
        low_gate = self.own(inputs.low_gate[self.tokens, columns], rows)
        low_up = self.own(inputs.low_up[self.tokens, columns], rows)
        g, u = self.own(self.gate, rows), self.own(self.up, rows)
        g.addmm_(low_gate, inputs.gate_B[e].to(self.dtype).T, alpha=self.scale)
        u.addmm_(low_up, inputs.up_B[e].to(self.dtype).T, alpha=self.scale)
        return PreActivation(g, u, low_gate, low_up)

    def drop(self, x: Tensor, rows: Rows) -> Tensor:
        """x [m, F] with the rows' dropout mask on it; x itself without dropout."""
        return x if self.mask is None else x * self.mask[self.order[rows.span]]

    def combine(self, x: Tensor, weighted: bool = False) -> Tensor:
        """The sum over each token's slots of x [p, F], times the routing weights if asked for: [b, F]."""
        weights = self.weights[self.position].squeeze(-1) if weighted else None
        return F.embedding_bag(self.position, x, mode="sum", per_sample_weights=weights)

    def scatter(self, x: Tensor, rows: Rows, out: Tensor) -> None:
        """Write x [m, r] to the rows' tokens and their expert's columns of ``out`` [N, n*r]."""
        out[self.tokens, self.columns(rows)].index_copy_(0, self.token[rows.span], x.to(out.dtype))


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """c [N, F] and z [N, n*r]; see `graphmoe_kernels.expert_swiglu`."""
    act = get_activation(settings.activation).function
    generator = settings.generator()
    c = torch.empty_like(inputs.gate, memory_format=torch.contiguous_format)
    z = inputs.low_gate.new_zeros(inputs.low_gate.shape)
    for span in blocks(inputs):
        block = Block(inputs, span, settings, generator)
        hidden = c.new_empty(block.order.numel(), c.shape[1], dtype=block.dtype)  # [p, F]
        for rows in block.rows:
            g, u, _, _ = block.pre_activation(rows)
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
        summed = name in ("fold_gate", "fold_up", "gate_B", "up_B", "down_A")
        return torch.zeros(x.shape, dtype=dtype if summed else x.dtype, device=x.device)

    given = {name: x for name, x in inputs._asdict().items() if x is not None}
    return inputs._replace(**{name: zeros(name, x) for name, x in given.items()})


def backward(grad_c: Tensor, grad_z: Tensor, inputs: Inputs, settings: Settings) -> Inputs:
    """The gradient of every floating input, in its place in `Inputs`; recomputes each block's pre-activation."""
    generator = settings.generator()
    grads = _new_gradients(inputs)
    for span in blocks(inputs):
        block = Block(inputs, span, settings, generator)
        d_gate, d_up = _block_backward(block, settings.activation, grad_c[span], grad_z[span], grads)
        grads.gate[span], grads.up[span] = d_gate, d_up
        if inputs.update is not None and grads.update is not None:
            state, fold_gate, fold_up = (t.to(block.dtype) for t in inputs.update)
            d_state, d_fold_gate, d_fold_up = grads.update
            d_state[span] = torch.addmm(d_gate @ fold_gate, d_up, fold_up)
            d_fold_gate.addmm_(d_gate.T, state[span])
            d_fold_up.addmm_(d_up.T, state[span])
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
        active = act.function(pre.g)
        hidden = active * pre.u  # [m, F]
        dz = block.own(grad_z[:, block.columns(rows)], rows)  # [m, r]
        d_hidden = block.drop(dz @ inputs.down_A[e].to(block.dtype), rows).add_(block.own(grad_c, rows))  # [m, F]
        grads.down_A[e].addmm_((dz * w).T, block.drop(hidden, rows))
        d_weights[span, 0] = torch.linalg.vecdot(hidden, d_hidden)
        d_hidden.mul_(w)
        torch.mul(act.derivative(pre.g).mul_(d_hidden), pre.u, out=d_gate[span])
        torch.mul(d_hidden, active, out=d_up[span])
        for d, B, d_B, low, d_low in (
            (d_gate[span], inputs.gate_B, grads.gate_B, pre.low_gate, grads.low_gate),
            (d_up[span], inputs.up_B, grads.up_B, pre.low_up, grads.low_up),
        ):
            d_B[e].addmm_(d.T, low, alpha=block.scale)
            block.scatter((d @ B[e].to(block.dtype)).mul_(block.scale), rows, d_low)
    grads.weights[block.tokens] = d_weights[block.position].squeeze(-1).to(grads.weights.dtype)
    return block.combine(d_gate), block.combine(d_up)
