"""The expert SwiGLU round as it runs on PyTorch: blocks of tokens, grouped by expert, nothing wide saved.

Tokens are taken in blocks small enough that the wide intermediates of one block stay in cache and in memory that the
allocator hands out again at once; a fresh [N, 2F] tensor costs a CPU more in page faults than the arithmetic on it.
Inside a block, the (token, slot) pairs are grouped by expert, so the low-rank products touch only the experts that were
chosen and the cost does not grow with the number of experts. Backward recomputes the pre-activation block by block.

Half-precision inputs are computed in fp32 within a block and rounded once on the way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.experts.reference import draw_dropout_mask, dropout_generator

# Bytes of one block's [tokens, 2F] pre-activation in the dtype of the computation; measured on 2-core CPUs, where 2 to
# 6 MB differ by a few per cent and 20 MB costs half as much again.
BLOCK_BYTES = 4 * 2**20
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


class Group(NamedTuple):
    """The (token, slot) pairs of one block that chose one expert."""

    expert: int
    rows: Tensor  # [m] token, counted from the block's start
    slots: Tensor  # [m]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a block is computed: fp32 for half precision, the input's own otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def blocks(tokens: int, width: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of tokens whose [tokens, 2 * width] pre-activation takes about `BLOCK_BYTES`."""
    size = max(MIN_BLOCK_TOKENS, BLOCK_BYTES // (2 * width * dtype.itemsize))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def groups(experts: Tensor, num_experts: int) -> Iterator[Group]:
    """The groups of one block's expert ids, [block, k]; experts that nobody chose have none."""
    slots = experts.shape[1]
    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    for expert, pairs in enumerate(order.split(counts)):
        if pairs.numel():
            yield Group(expert, pairs // slots, pairs % slots)


class _Block:
    """One block of tokens: its pre-activation and what a group reads from it, in the dtype of the computation."""

    def __init__(self, inputs: Inputs, tokens: slice, scale: float, generator: torch.Generator | None, dropout: float):
        self.inputs, self.tokens, self.scale = inputs, tokens, scale
        self.dtype = compute_dtype(inputs.gate.dtype)
        self.rank = inputs.down_A.shape[1]
        self.experts = inputs.experts[tokens]
        self.weights = inputs.weights[tokens].to(self.dtype)
        self.gate, self.up = inputs.gate[tokens], inputs.up[tokens]
        if inputs.state is not None and inputs.fold_gate is not None and inputs.fold_up is not None:
            state = inputs.state[tokens]
            self.gate = torch.addmm(self.gate, state, inputs.fold_gate.T)
            self.up = torch.addmm(self.up, state, inputs.fold_up.T)
        self.mask: Tensor | None = None
        if generator is not None:
            shape = (*self.experts.shape, self.gate.shape[1])
            self.mask = draw_dropout_mask(generator, dropout, shape).to(self.gate.device, self.dtype)

    def columns(self, group: Group) -> slice:
        """Where this group's expert stands in an [N, n*r] tensor."""
        return slice(group.expert * self.rank, (group.expert + 1) * self.rank)

    def low_rank(self, group: Group) -> tuple[Tensor, Tensor]:
        """The group's low-rank activations of gate and up, [m, r] each."""
        columns, rows = self.columns(group), group.rows
        low_gate = self.inputs.low_gate[self.tokens, columns].index_select(0, rows)
        low_up = self.inputs.low_up[self.tokens, columns].index_select(0, rows)
        return low_gate.to(self.dtype), low_up.to(self.dtype)

    def pre_activation(self, group: Group, low_gate: Tensor, low_up: Tensor) -> tuple[Tensor, Tensor]:
        """g and u of the group's pairs, [m, F] each: the base pre-activation plus s B (A x)."""
        e = group.expert
        g = self.gate.index_select(0, group.rows).to(self.dtype)
        u = self.up.index_select(0, group.rows).to(self.dtype)
        g.addmm_(low_gate, self.inputs.gate_B[e].to(self.dtype).T, alpha=self.scale)
        u.addmm_(low_up, self.inputs.up_B[e].to(self.dtype).T, alpha=self.scale)
        return g, u

    def keep(self, group: Group) -> Tensor | None:
        """The group's dropout mask, [m, F], or None."""
        return None if self.mask is None else self.mask[group.rows, group.slots]


def _generator(dropout: float, seed: Tensor | None) -> torch.Generator | None:
    return dropout_generator(seed) if dropout > 0 and seed is not None else None


def forward(
    inputs: Inputs, scale: float, activation: str, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """c [N, F] and z [N, n*r]; see `graphmoe_kernels.expert_swiglu`."""
    act = get_activation(activation).function
    tokens, width = inputs.gate.shape
    num_experts = inputs.gate_B.shape[0]
    dtype = compute_dtype(inputs.gate.dtype)
    generator = _generator(dropout, seed)
    c = inputs.gate.new_empty(tokens, width)
    z = inputs.low_gate.new_zeros(inputs.low_gate.shape)
    for span in blocks(tokens, width, dtype):
        block = _Block(inputs, span, scale, generator, dropout)
        c_block = torch.zeros_like(c[span], dtype=dtype)
        for group in groups(block.experts, num_experts):
            low_gate, low_up = block.low_rank(group)
            g, u = block.pre_activation(group, low_gate, low_up)
            hidden = act(g).mul_(u)  # [m, F]
            w = block.weights[group.rows, group.slots, None]  # [m, 1]
            mask = block.keep(group)
            read = hidden if mask is None else hidden * mask
            narrow = (read @ inputs.down_A[group.expert].to(dtype).T) * w  # [m, r]
            z[span, block.columns(group)] = z[span, block.columns(group)].index_add(0, group.rows, narrow.to(z.dtype))
            c_block.index_add_(0, group.rows, hidden.mul_(w))
        c[span] = c_block
    return c, z


class Gradients(NamedTuple):
    """What `backward` fills; the folds' gradients are accumulated in fp32 (fp64 for fp64 inputs)."""

    gate: Tensor
    up: Tensor
    state: Tensor | None
    fold_gate: Tensor | None
    fold_up: Tensor | None
    low_gate: Tensor
    low_up: Tensor
    gate_B: Tensor
    up_B: Tensor
    down_A: Tensor
    weights: Tensor

    @classmethod
    def zeros(cls, inputs: Inputs, dtype: torch.dtype) -> Gradients:
        """Zeros like the inputs; what is summed over tokens is in the accumulation dtype."""

        def summed(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)

        def each(x: Tensor) -> Tensor:
            return torch.zeros_like(x, memory_format=torch.contiguous_format)

        return cls(
            torch.empty_like(inputs.gate, memory_format=torch.contiguous_format),
            torch.empty_like(inputs.up, memory_format=torch.contiguous_format),
            None if inputs.state is None else torch.empty_like(inputs.state),
            summed(inputs.fold_gate),
            summed(inputs.fold_up),
            each(inputs.low_gate),
            each(inputs.low_up),
            summed(inputs.gate_B),  # type: ignore[arg-type]
            summed(inputs.up_B),  # type: ignore[arg-type]
            summed(inputs.down_A),  # type: ignore[arg-type]
            torch.zeros_like(inputs.weights),
        )


def backward(
    grad_c: Tensor,
    grad_z: Tensor,
    inputs: Inputs,
    scale: float,
    activation: str,
    dropout: float,
    seed: Tensor | None,
) -> Gradients:
    """The gradient of every floating input; recomputes each block's pre-activation."""
    width = inputs.gate.shape[1]
    dtype = compute_dtype(inputs.gate.dtype)
    generator = _generator(dropout, seed)
    grads = Gradients.zeros(inputs, dtype)
    for span in blocks(inputs.gate.shape[0], width, dtype):
        block = _Block(inputs, span, scale, generator, dropout)
        d_pre = grad_c.new_zeros(2, span.stop - span.start, width, dtype=dtype)
        for group in groups(block.experts, inputs.gate_B.shape[0]):
            _group_backward(block, group, activation, grad_c[span], grad_z[span], grads, d_pre)
        d_gate, d_up = d_pre.to(grad_c.dtype)
        grads.gate[span], grads.up[span] = d_gate, d_up
        if grads.state is not None and grads.fold_gate is not None and grads.fold_up is not None:
            assert inputs.state is not None and inputs.fold_gate is not None and inputs.fold_up is not None
            state = inputs.state[span]
            torch.addmm(d_gate @ inputs.fold_gate, d_up, inputs.fold_up, out=grads.state[span])
            grads.fold_gate.add_(d_gate.T @ state)
            grads.fold_up.add_(d_up.T @ state)
    return grads


def _group_backward(
    block: _Block, group: Group, activation: str, grad_c: Tensor, grad_z: Tensor, grads: Gradients, d_pre: Tensor
) -> None:
    """Adds one group's part to ``grads`` and to the block's pre-activation gradient ``d_pre`` [2, block, F]."""
    act = get_activation(activation)
    inputs, dtype, span = block.inputs, block.dtype, block.tokens
    e, rows, columns = group.expert, group.rows, block.columns(group)
    low_gate, low_up = block.low_rank(group)
    g, u = block.pre_activation(group, low_gate, low_up)
    active = act.function(g)
    hidden = active * u  # [m, F]
    mask = block.keep(group)

    dz = grad_z[:, columns].index_select(0, rows).to(dtype)  # [m, r]
    d_hidden = dz @ inputs.down_A[e].to(dtype)  # [m, F]
    read = hidden
    if mask is not None:
        d_hidden *= mask
        read = hidden * mask
    d_hidden += grad_c.index_select(0, rows).to(dtype)
    w = block.weights[rows, group.slots, None]  # [m, 1]
    grads.down_A[e] += (dz * w).T @ read
    grads.weights[span].index_put_(
        (rows, group.slots), torch.linalg.vecdot(hidden, d_hidden).to(grads.weights.dtype), accumulate=True
    )
    d_hidden *= w
    d_g = act.derivative(g).mul_(d_hidden).mul_(u)
    d_u = d_hidden.mul_(active)
    d_pre[0].index_add_(0, rows, d_g)
    d_pre[1].index_add_(0, rows, d_u)
    grads.gate_B[e].addmm_(d_g.T, low_gate, alpha=block.scale)
    grads.up_B[e].addmm_(d_u.T, low_up, alpha=block.scale)
    for d_low, d, B in ((grads.low_gate, d_g, inputs.gate_B), (grads.low_up, d_u, inputs.up_B)):
        d_low[span, columns] = d_low[span, columns].index_add(
            0, rows, (d @ B[e].to(dtype)).mul_(block.scale).to(d_low.dtype)
        )
