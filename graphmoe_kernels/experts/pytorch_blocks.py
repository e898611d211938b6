"""What the PyTorch forms of the expert operators share: blocks of tokens, the dtype they are computed in, the update.

Half-precision inputs are computed in fp32 and rounded once on the way out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.experts.operands import GateUp, LowRankUpdate

# Bytes of one wide tensor of a block of tokens, [b, F], and of a run of pairs, [m, F], in the dtype of the computation.
# Measured on a 2-core CPU with 32 MiB of L3, one thread. Blocks of a quarter take half as much time again with 64
# experts (F = 8192, 256 tokens), whose matrices are read once per block. Runs of half these bytes are level; one run of
# a block's pairs (F = 1536, 496 tokens) takes a fifth longer, forward and backward.
BLOCK_BYTES = 12 * 2**20
RUN_BYTES = 2 * 2**20
MIN_BLOCK_TOKENS = 16


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a block is computed: fp32 for half precision, the input's own otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def on_host(x: Tensor) -> bool:
    """Tell whether x is on the CPU, where blocks stay in cache and the host reads a number without waiting."""
    return x.device.type == "cpu"


def block_size(gate: Tensor) -> int:
    """Tokens of ``gate`` [N, F] per block: even blocks of at most `BLOCK_BYTES` on a CPU, all tokens elsewhere."""
    tokens, width = gate.shape
    if not on_host(gate):
        return max(1, tokens)
    largest = max(MIN_BLOCK_TOKENS, BLOCK_BYTES // (width * compute_dtype(gate.dtype).itemsize))
    return max(1, math.ceil(tokens / max(1, math.ceil(tokens / largest))))


def run_size(width: int, dtype: torch.dtype) -> int:
    """How many pairs of a block are computed at a time: each of their wide tensors takes `RUN_BYTES` at most."""
    return max(1, RUN_BYTES // (width * dtype.itemsize))


def blocks(gate: Tensor) -> Iterator[slice]:
    """Slices of the tokens of ``gate`` [N, F] that are computed together."""
    tokens, size = gate.shape[0], block_size(gate)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def scratch(name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Give memory on the CPU for [rows, width], where this thread's last tensor of that name lay.

    It stays with the thread, up to `BLOCK_BYTES` for each name of a block and `RUN_BYTES` for each of a run: handing it
    back to the system and getting it again, page by page, takes longer than what is computed in it.
    """
    held: Any = vars(_held)
    flat = held.get((name, dtype))
    if flat is None or flat.numel() < rows * width:
        with torch.inference_mode(False):  # what is made in it could not be written to outside of it
            flat = torch.empty(rows * width, dtype=dtype, device="cpu")
        held[name, dtype] = flat
    return flat[: rows * width].view(rows, width)


def scratch_on_host(name: str, like: Tensor) -> Tensor | None:
    """Give `scratch` for what has the rows, columns and dtype of ``like``; None on other devices."""
    return scratch(name, like.shape[0], like.shape[1], like.dtype) if on_host(like) else None


_held = threading.local()


def updated(pre_activations: GateUp, update: LowRankUpdate | None, tokens: slice | None = None) -> GateUp:
    """The pre-activations [b, F] of some tokens or of all, an update of low rank in them."""
    gate, up = pre_activations
    if tokens is not None:
        gate, up = gate[tokens], up[tokens]
    if update is None:
        return GateUp(gate, up)
    state = update.state if tokens is None else update.state[tokens]
    return GateUp(torch.addmm(gate, state, update.gate.t()), torch.addmm(up, state, update.up.t()))


def add_update_gradients(
    grads: dict[str, Tensor], d_gate: Tensor, d_up: Tensor, update: LowRankUpdate, span: slice
) -> None:
    """Write the gradients of an update's state for some tokens, and add these tokens' to those of its matrices."""
    state, fold_gate, fold_up = (t.to(d_gate.dtype) for t in update)
    grads["state"][span] = torch.addmm(d_gate @ fold_gate, d_up, fold_up)
    grads["fold_gate"].addmm_(d_gate.T, state[span])
    grads["fold_up"].addmm_(d_up.T, state[span])
