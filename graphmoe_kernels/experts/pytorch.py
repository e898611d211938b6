"""The expert SwiGLU round as it runs on PyTorch: blocks of tokens, grouped by expert, nothing wide saved.

Tokens are taken in blocks small enough that the wide intermediates of one block stay in cache and in memory that the
allocator hands out again at once; a fresh [N, 2F] tensor costs a CPU more in page faults than the arithmetic on it.
Inside a block the (token, slot) pairs are sorted by expert: pointwise work runs on all pairs at once, the low-rank
products on each chosen expert's own rows, so the cost does not grow with the number of experts. Backward recomputes the
pre-activation block by block.

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

# Bytes of one block's wide intermediate [tokens * k, 2F] in the dtype of the computation. On a 2-core server CPU with
# F = 5632 this is best by a little, at 256 tokens and at 1024: 2 MB costs twice the time, 24 MB a tenth more.
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


class Block:
    """One block of b tokens with its p = b * k (token, slot) pairs sorted by expert.

    Attributes:
        tokens: the block's slice of the batch.
        rows, slots, experts: [p], each pair's token (counted from the block's start), slot and expert.
        position: [b, k], where a token's slots stand among the sorted pairs.
        groups: (expert, slice of the sorted pairs) for every expert that somebody chose.
        mask: [p, F] dropout mask or None.
    """

    def __init__(self, inputs: Inputs, tokens: slice, settings: Settings, generator: torch.Generator | None) -> None:
        self.inputs, self.tokens, self.scale = inputs, tokens, settings.scale
        self.dtype = compute_dtype(inputs.gate.dtype)
        chosen = inputs.experts[tokens]  # [b, k]
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        k = chosen.shape[1]
        self.rows, self.slots = order // k, order % k
        self.experts = flat[order]
        self.position = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        self.position = self.position.view_as(chosen)
        counts = torch.bincount(flat, minlength=inputs.gate_B.shape[0]).tolist()
        stops = list(itertools.accumulate(counts))
        self.groups = [(e, slice(stop - m, stop)) for e, (m, stop) in enumerate(zip(counts, stops, strict=True)) if m]
        self.mask: Tensor | None = None
        if generator is not None:
            drawn = draw_dropout_mask(generator, settings.dropout, (*chosen.shape, inputs.gate.shape[1]))
            self.mask = drawn.to(flat.device, self.dtype).flatten(0, 1)[order]

    def pairs(self, x: Tensor) -> Tensor:
        """Each pair's row of x [b, ...], in the dtype of the computation: [p, ...]."""
        return x.index_select(0, self.rows).to(self.dtype)

    def combine(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """sum_j w_j x_j over each token's slots, for x [p, F] and weights [b, k] (1 if None): [b, F]."""
        return F.embedding_bag(self.position, x, mode="sum", per_sample_weights=weights)

    def weights(self) -> Tensor:
        """The routing weights [b, k] in the dtype of the computation."""
        return self.inputs.weights[self.tokens].to(self.dtype)

    def low_rank(self, low: Tensor) -> Tensor:
        """Each pair's own expert's part of a low-rank activation [N, n*r]: [p, r]."""
        rank = self.inputs.down_A.shape[1]
        own = low[self.tokens].unflatten(1, (-1, rank))[self.rows, self.experts]
        return own.to(self.dtype)

    def pre_activation(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g and u [p, F], base plus update plus s B (A x), and the low-rank activations [p, r] they were made with."""
        inputs = self.inputs
        gate, up = inputs.gate[self.tokens], inputs.up[self.tokens]
        if inputs.update is not None:
            state, fold_gate, fold_up = inputs.update
            gate = torch.addmm(gate, state[self.tokens], fold_gate.T)
            up = torch.addmm(up, state[self.tokens], fold_up.T)
        g, u = self.pairs(gate), self.pairs(up)
        low_gate, low_up = self.low_rank(inputs.low_gate), self.low_rank(inputs.low_up)
        for e, group in self.groups:
            g[group].addmm_(low_gate[group], inputs.gate_B[e].to(self.dtype).T, alpha=self.scale)
            u[group].addmm_(low_up[group], inputs.up_B[e].to(self.dtype).T, alpha=self.scale)
        return g, u, low_gate, low_up


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """c [N, F] and z [N, n*r]; see `graphmoe_kernels.expert_swiglu`."""
    act = get_activation(settings.activation).function
    rank = inputs.down_A.shape[1]
    generator = settings.generator()
    c = torch.empty_like(inputs.gate, memory_format=torch.contiguous_format)
    z = inputs.low_gate.new_zeros(inputs.low_gate.shape)
    for span in blocks(inputs):
        block = Block(inputs, span, settings, generator)
        g, u, _, _ = block.pre_activation()
        hidden = act(g).mul_(u)  # [p, F]
        weights = block.weights()
        c[span] = block.combine(hidden, weights)
        if block.mask is not None:
            hidden.mul_(block.mask)
        narrow = g.new_empty(hidden.shape[0], rank)
        for e, group in block.groups:
            torch.mm(hidden[group], inputs.down_A[e].to(g.dtype).T, out=narrow[group])
        narrow.mul_(weights[block.rows, block.slots, None])
        z[span].unflatten(1, (-1, rank))[block.rows, block.experts] = narrow.to(z.dtype)
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
    inputs, dtype, span = block.inputs, block.dtype, block.tokens
    rank = inputs.down_A.shape[1]
    g, u, low_gate, low_up = block.pre_activation()
    active = act.function(g)
    hidden = active * u  # [p, F]
    read = hidden if block.mask is None else hidden * block.mask

    dz = grad_z.unflatten(1, (-1, rank))[block.rows, block.experts].to(dtype)  # [p, r]
    w = block.weights()[block.rows, block.slots, None]  # [p, 1]
    d_hidden = torch.empty_like(hidden)
    for e, group in block.groups:
        torch.mm(dz[group], inputs.down_A[e].to(dtype), out=d_hidden[group])
        grads.down_A[e].addmm_((dz[group] * w[group]).T, read[group])
    if block.mask is not None:
        d_hidden.mul_(block.mask)
    d_hidden.add_(block.pairs(grad_c))
    d_weights = torch.linalg.vecdot(hidden, d_hidden).to(grads.weights.dtype)
    grads.weights[span].index_put_((block.rows, block.slots), d_weights)

    d_hidden.mul_(w)
    d_g = act.derivative(g).mul_(d_hidden).mul_(u)
    d_u = d_hidden.mul_(active)
    for d, B, d_B, low, d_low in (
        (d_g, inputs.gate_B, grads.gate_B, low_gate, grads.low_gate),
        (d_u, inputs.up_B, grads.up_B, low_up, grads.low_up),
    ):
        narrow = torch.empty_like(low)
        for e, group in block.groups:
            d_B[e].addmm_(d[group].T, low[group], alpha=block.scale)
            torch.mm(d[group], B[e].to(dtype), out=narrow[group])
        narrow.mul_(block.scale)
        d_low[span].unflatten(1, (-1, rank))[block.rows, block.experts] = narrow.to(d_low.dtype)
    return block.combine(d_g), block.combine(d_u)
