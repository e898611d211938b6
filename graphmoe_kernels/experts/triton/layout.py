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
    (gate, up), low, B, down_A, weights, ids, low_update, update, scales, biases, dropout = operands
    stride_gate, one_gate = gate.stride()
    stride_up, one_up = up.stride()
    stride_low, one_low = low.stride()
    stride_update, one_update = (0, 1) if low_update is None else low_update.stride()
    stride_state, one_state = (0, 1) if update is None else update.state.stride()
    if (
        dropout is not None
        or not one_gate == one_up == one_low == one_update == one_state == 1
        or not (_contiguous(B) and down_A.is_contiguous() and weights.is_contiguous() and ids.is_contiguous())
        or not (update is None or (update.gate.is_contiguous() and update.up.is_contiguous()))
        or not (scales is None or _contiguous(scales))
        or not (biases is None or _contiguous(biases))
    ):
        operands = _laid_out(operands)
        stride_gate, stride_up = operands.pre_activations.gate.stride(0), operands.pre_activations.up.stride(0)
        stride_low = operands.low.stride(0)
        stride_update = 0 if operands.low_update is None else operands.low_update.stride(0)
        stride_state = 0 if operands.update is None else operands.update.state.stride(0)
    return operands, RowStrides(stride_gate, stride_up, stride_state, stride_low, stride_update)


def readable_shared(
    pre_activations: GateUp, update: LowRankUpdate | None
) -> tuple[GateUp, LowRankUpdate | None, RowStrides]:
    """`readable` for what all experts share."""
    gate, up = by_rows(pre_activations.gate), by_rows(pre_activations.up)
    update = _laid_out_update(update)
    state = 0 if update is None else update.state.stride(0)
    return GateUp(gate, up), update, RowStrides(gate.stride(0), up.stride(0), state, 0, 0)


def _contiguous(pair: GateUp) -> bool:
    return pair.gate.is_contiguous() and pair.up.is_contiguous()


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
