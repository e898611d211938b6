"""Operands as the kernels read them: rows whose neighbours are neighbours in memory, and how far apart rows are."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from graphmoe_kernels.experts.dropout import kept_scale, threshold
from graphmoe_kernels.experts.operands import ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.launching import by_rows
from graphmoe_kernels.structures import map_tensors


class RowStrides(NamedTuple):
    """From one token's row to the next, in elements; 0 for what is not there."""

    gate: int
    up: int
    state: int
    low: int
    low_update: int


class Mask(NamedTuple):
    """Dropout as a kernel draws it: a 16-bit number below ``threshold`` drops, ``kept`` multiplies what stays."""

    seed: Tensor
    threshold: int
    kept: float


def readable(operands: ExpertOperands) -> tuple[ExpertOperands, RowStrides]:
    """The operands for the kernels, ``dropout`` as a `Mask`: no copy and no new tuple where all is laid out already."""
    if operands.dropout is not None or not _is_laid_out(operands):
        operands = _laid_out(operands)
    return operands, _strides(operands.pre_activations, operands.update, operands.low, operands.low_update)


def readable_shared(
    pre_activations: GateUp, update: LowRankUpdate | None
) -> tuple[GateUp, LowRankUpdate | None, RowStrides]:
    """`readable` for what all experts share."""
    pre_activations, update = map_tensors(by_rows, pre_activations), _laid_out_update(update)
    return pre_activations, update, _strides(pre_activations, update)


def _strides(
    pre_activations: GateUp, update: LowRankUpdate | None, low: Tensor | None = None, low_update: Tensor | None = None
) -> RowStrides:
    state = None if update is None else update.state
    return RowStrides(*(0 if t is None else t.stride(0) for t in (*pre_activations, state, low, low_update)))


def _is_laid_out(operands: ExpertOperands) -> bool:
    """Whether `_laid_out` would change nothing."""
    pre_activations, low, B, down_A, weights, ids, low_update, update, scales, biases, _, _ = operands
    rows = [*pre_activations, low]
    whole = [*B, down_A, weights, ids, *(scales or ()), *(biases or ())]
    if low_update is not None:
        rows.append(low_update)
    if update is not None:
        rows.append(update.state)
        whole += update.gate, update.up
    return all(t.stride(1) == 1 for t in rows) and all(t.is_contiguous() for t in whole)


def _laid_out_update(update: LowRankUpdate | None) -> LowRankUpdate | None:
    if update is None:
        return None
    return LowRankUpdate(by_rows(update.state), update.gate.contiguous(), update.up.contiguous())


def _laid_out(operands: ExpertOperands) -> ExpertOperands:
    mask: Any = None
    if operands.dropout is not None:
        rate, seed = operands.dropout
        mask = Mask(seed, threshold(rate), kept_scale(rate))
    return operands._replace(
        pre_activations=map_tensors(by_rows, operands.pre_activations),
        low=by_rows(operands.low),
        B=map_tensors(Tensor.contiguous, operands.B),
        down_A=operands.down_A.contiguous(),
        routing_weights=operands.routing_weights.contiguous(),
        expert_ids=operands.expert_ids.contiguous(),
        low_update=map_tensors(by_rows, operands.low_update),
        update=_laid_out_update(operands.update),
        scales=map_tensors(Tensor.contiguous, operands.scales),
        biases=map_tensors(Tensor.contiguous, operands.biases),
        dropout=mask,
    )
