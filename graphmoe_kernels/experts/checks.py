"""What the public expert operators refuse, by the operands' names as the caller wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.experts.operands import Dropout, ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.validation import INTEGER_DTYPES, check_device, check_dropout, check_floats, check_tensor

_MAIN = "pre_activations.gate"

Shape = tuple[int, ...]


def check_operands(operands: ExpertOperands) -> None:
    """`TypeError` or `ValueError` for operands that no backend takes; nothing is read but types, shapes and devices."""
    _check_types(operands)
    _check_shapes(operands)
    gate = operands.pre_activations.gate
    if operands.biases is not None:
        _check_biases(operands.biases, gate)
    if operands.dropout is not None:
        _check_seed(operands.dropout, gate)
    if operands.token_order is not None:
        _check_order(operands.token_order, gate)


def check_shared(pre_activations: GateUp, update: LowRankUpdate | None) -> None:
    """`check_operands` for `swiglu`."""
    _check_type("pre_activations", pre_activations, GateUp)
    if update is not None:
        _check_type("update", update, LowRankUpdate)
    named = dict(_named(pre_activations=pre_activations, update=update))
    for name, tensor in named.items():
        check_floats(name, tensor)
    gate = pre_activations.gate
    if gate.dim() != 2:
        raise ValueError(f"expected {_MAIN} [tokens, F]; got {list(gate.shape)}")
    tokens, width = gate.shape
    shapes = _shapes(tokens, width, 0, 0, 0, _inner(update))
    _check_each(named, shapes, gate, f"{tokens} tokens and F={width}")


def _check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {type(value).__name__}")


def _check_types(operands: ExpertOperands) -> None:
    _check_type("operands", operands, ExpertOperands)
    _check_type("pre_activations", operands.pre_activations, GateUp)
    _check_type("B", operands.B, GateUp)
    optional: dict[str, type] = {"update": LowRankUpdate, "scales": GateUp, "biases": GateUp, "dropout": Dropout}
    for name, kind in optional.items():
        value = getattr(operands, name)
        if value is not None:
            _check_type(name, value, kind)
    if operands.dropout is not None:
        check_dropout(operands.dropout.rate, "dropout.rate")


def _named(**groups: Any) -> Iterator[tuple[str, Any]]:
    """The tensors in groups of operands, with the names by which the caller knows them."""
    for group, value in groups.items():
        if isinstance(value, GateUp | LowRankUpdate):
            yield from ((f"{group}.{field}", tensor) for field, tensor in value._asdict().items())
        elif value is not None:
            yield group, value


def _inner(update: LowRankUpdate | None) -> int:
    return update.state.shape[-1] if update is not None and update.state.dim() else 0


def _check_shapes(operands: ExpertOperands) -> None:
    required = {name: getattr(operands, name) for name in ("low", "down_A", "routing_weights")}
    groups = {name: getattr(operands, name) for name in ("pre_activations", "B", "low_update", "update", "scales")}
    floating = required | dict(_named(**groups))
    for name, tensor in floating.items():
        check_floats(name, tensor)
    gate, down_A, ids = operands.pre_activations.gate, operands.down_A, operands.expert_ids
    check_tensor("expert_ids", ids)
    if ids.dtype not in INTEGER_DTYPES:
        raise TypeError(f"expert_ids must be integers (int64, int32, int16, int8 or uint8), got {ids.dtype}")
    if gate.dim() != 2 or down_A.dim() != 3 or ids.dim() != 2:
        raise ValueError(
            f"expected {_MAIN} [tokens, F], down_A [experts, rank, F] and expert_ids [tokens, k]; "
            f"got {list(gate.shape)}, {list(down_A.shape)} and {list(ids.shape)}"
        )
    tokens, width = gate.shape
    n, r, _ = down_A.shape
    k = ids.shape[1]
    shapes = _shapes(tokens, width, n, r, k, _inner(operands.update))
    sizes = f"{tokens} tokens, F={width}, {n} experts of rank {r} (by down_A) and k={k}"
    _check_each(floating | {"expert_ids": ids}, shapes, gate, sizes)
    if not 1 <= k <= n:
        raise ValueError(f"each token needs 1..{n} experts (there are {n}), got k={k}")


def _shapes(tokens: int, width: int, n: int, r: int, k: int, inner: int) -> dict[str, Shape]:
    return {
        "pre_activations.gate": (tokens, width),
        "pre_activations.up": (tokens, width),
        "low": (tokens, 2 * n * r),
        "B.gate": (n, width, r),
        "B.up": (n, width, r),
        "down_A": (n, r, width),
        "routing_weights": (tokens, k),
        "expert_ids": (tokens, k),
        "low_update": (tokens, 2 * n * r),
        "update.state": (tokens, inner),
        "update.gate": (width, inner),
        "update.up": (width, inner),
        "scales.gate": (n, width),
        "scales.up": (n, width),
    }


def _check_each(named: dict[str, Tensor], shapes: dict[str, Shape], gate: Tensor, sizes: str) -> None:
    """Every tensor against its shape, and where it is."""
    for name, tensor in named.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} must be {list(shapes[name])} for {sizes}; got {list(tensor.shape)}")
        check_device(name, tensor, _MAIN, gate)
    if gate.shape[1] == 0:
        raise ValueError(f"{_MAIN} must be [tokens, F] with F of at least 1, got {list(gate.shape)}")


def _check_biases(biases: GateUp, gate: Tensor) -> None:
    width = gate.shape[1]
    for name, bias in _named(biases=biases):
        check_floats(name, bias)
        if bias.shape != (width,):
            raise ValueError(f"{name} must be [{width}], as many as {_MAIN} has columns, got {list(bias.shape)}")
        check_device(name, bias, _MAIN, gate)
        if bias.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} is a constant of this operator and gets no gradient; pass it detached")


def _check_seed(dropout: Dropout, gate: Tensor) -> None:
    """A wrong seed would mean another mask on another backend."""
    seed = dropout.seed
    check_tensor("dropout.seed", seed)
    check_device("dropout.seed", seed, _MAIN, gate)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"dropout.seed must be one int64, as of torch.randint(2**62, (1,)), got {seed.dtype} {list(seed.shape)}"
        )


def _check_order(order: Tensor, gate: Tensor) -> None:
    """A wrong order would be read past its end."""
    tokens = gate.shape[0]
    check_tensor("token_order", order)
    check_device("token_order", order, _MAIN, gate)
    if order.dtype != torch.int32 or order.shape != (tokens,) or not order.is_contiguous():
        raise ValueError(
            f"token_order must be int32 [{tokens}] and contiguous, a permutation of the tokens (expert_order makes "
            f"one), got {order.dtype} {list(order.shape)}"
        )
