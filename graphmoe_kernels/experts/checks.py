"""What the public expert operators refuse, by the operands' names as the caller wrote them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphmoe_kernels.experts.operands import Dropout, ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.validation import (
    Shape,
    agreed,
    check_device,
    check_dropout,
    check_floats,
    check_integers,
    check_shapes,
    check_tensor,
    check_type,
)

_MAIN = "pre_activations.gate"
_PARTS = {"pre_activations": GateUp, "B": GateUp, "update": LowRankUpdate, "scales": GateUp, "biases": GateUp}
_PARTS |= {"dropout": Dropout}


def check_operands(operands: ExpertOperands) -> None:
    """`TypeError` or `ValueError` for operands that no backend takes; nothing is read but types, shapes and devices."""
    check_type("operands", operands, ExpertOperands)
    for name, kind in _PARTS.items():
        check_type(name, getattr(operands, name), kind, optional=name in ExpertOperands._field_defaults)
    gate, down_A, ids = operands.pre_activations.gate, operands.down_A, operands.expert_ids
    check_floats(_MAIN, gate)
    check_floats("down_A", down_A)
    check_integers("expert_ids", ids)
    if gate.dim() != 2 or down_A.dim() != 3 or ids.dim() != 2:
        raise ValueError(
            f"expected {_MAIN} [tokens, F], down_A [experts, rank, F] and expert_ids [tokens, k]; "
            f"got {list(gate.shape)}, {list(down_A.shape)} and {list(ids.shape)}"
        )
    pre, B, weights = operands.pre_activations, operands.B, operands.routing_weights
    N = agreed((gate, 0), (pre.up, 0), (operands.low, 0), (ids, 0), (weights, 0))
    F = agreed((gate, 1), (pre.up, 1), (B.gate, 1), (B.up, 1), (down_A, 2))
    n = agreed((B.gate, 0), (B.up, 0), (down_A, 0))
    r = agreed((B.gate, 2), (B.up, 2), (down_A, 1))
    k = agreed((ids, 1), (weights, 1))
    main, low = (_MAIN, gate), (N, 2 * n * r)
    shapes: dict[str, Shape] = {
        **{"down_A": (n, r, F), "B": (n, F, r), "low": low, "low_update": low},
        **{"routing_weights": (N, k), "scales": (n, F), "biases": (F,)},
    }

    def told() -> str:
        return f"{N} tokens, F={F}, {n} experts of rank {r} (by B and down_A) and k={k}"

    _check_shared(pre, operands.update, (N, F), told)
    check_shapes("", ("expert_ids",), (ids,), ((N, k),), told, main, integers=True)
    for name, shape in shapes.items():
        value = getattr(operands, name)
        if isinstance(value, GateUp):
            check_shapes(f"{name}.", GateUp._fields, value, (shape, shape), told, main)
        elif value is not None or name not in ExpertOperands._field_defaults:
            check_shapes("", (name,), (value,), (shape,), told, main)
    if not 1 <= k <= n:
        raise ValueError(f"each token needs 1..{n} experts (there are {n}), got k={k}")
    for field, bias in zip(GateUp._fields, operands.biases or (), strict=False):
        if bias.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"biases.{field} is a constant of this operator and gets no gradient; pass it detached")
    if operands.dropout is not None:
        _check_dropout(operands.dropout, gate)


def check_shared(pre_activations: GateUp, update: LowRankUpdate | None) -> None:
    """`check_operands` for `swiglu`."""
    check_type("pre_activations", pre_activations, GateUp)
    check_type("update", update, LowRankUpdate, optional=True)
    gate = pre_activations.gate
    check_floats(_MAIN, gate)
    if gate.dim() != 2:
        raise ValueError(f"expected {_MAIN} [tokens, F]; got {list(gate.shape)}")
    own = () if update is None else ((update.gate, 0), (update.up, 0))
    N = agreed((gate, 0), (pre_activations.up, 0), (update and update.state, 0))
    F = agreed((gate, 1), (pre_activations.up, 1), *own)
    _check_shared(pre_activations, update, (N, F), lambda: f"{N} tokens and F={F}")


def _check_shared(
    pre_activations: GateUp, update: LowRankUpdate | None, sizes: tuple[int, int], told: Callable[[], str]
) -> None:
    """Check what all experts share, by N and F; the gate's pre-activations are a matrix already."""
    gate = pre_activations.gate
    N, F = sizes
    if F == 0:
        raise ValueError(f"{_MAIN} must be [tokens, F] with F of at least 1, got {list(gate.shape)}")
    check_shapes("pre_activations.", GateUp._fields, pre_activations, ((N, F), (N, F)), told, (_MAIN, gate))
    if update is not None:
        G = agreed((update.state, 1), (update.gate, 1), (update.up, 1))
        check_shapes("update.", LowRankUpdate._fields, update, ((N, G), (F, G), (F, G)), told, (_MAIN, gate))


def _check_dropout(dropout: Dropout, gate: Tensor) -> None:
    """A wrong seed would mean another mask on another backend."""
    rate, seed = dropout
    check_dropout(rate, "dropout.rate")
    check_tensor("dropout.seed", seed)
    check_device("dropout.seed", seed, _MAIN, gate)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"dropout.seed must be one int64, as of torch.randint(2**62, (1,)), got {seed.dtype} {list(seed.shape)}"
        )
