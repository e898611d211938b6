"""The expert SwiGLU round: base pre-activation, experts' low-rank terms, activation and combination in one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.backend import resolve_backend
from graphmoe_kernels.experts import reference
from graphmoe_kernels.experts.op import expert_swiglu_op


def expert_swiglu(
    gate: Tensor,
    up: Tensor,
    low_gate: Tensor,
    low_up: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    scale: float = 1.0,
    activation: str = "silu",
    state: Tensor | None = None,
    fold_gate: Tensor | None = None,
    fold_up: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """c = sum_j w_j act(g_j) * u_j and z = sum_j w_j A_D,e_j (act(g_j) * u_j) over a token's k slots.

    g_j = ``gate`` + ``state`` ``fold_gate``^T + s B_G,e_j a_G,e_j, and u_j likewise: the experts of MixLoRA, with their
    outputs combined before the (linear, shared) down projection. The caller gets y = W_D c + s B_D z. A method whose
    experts are mixed inside each linear (LoRAMoE, MoLA) is one expert of rank n*r with its gates multiplied into the
    low-rank activations.

    Args:
        gate, up: [N, F], the frozen projections' output; each row contiguous, any row stride.
        low_gate, low_up: [N, n*r], A x of every expert, expert-major.
        gate_B, up_B: [n, F, r].
        down_A: [n, r, F].
        weights: [N, k]; experts: [N, k] integers in 0..n-1, distinct within a row.
        scale: s = alpha / r.
        activation: a name of `graphmoe_kernels.ACTIVATIONS`.
        state, fold_gate, fold_up: [N, G], [F, G], [F, G]: the later rounds' update of the pre-activation; all or none.
        dropout, seed: LoRA dropout on the input of ``down_A``; the seed (one int64) names the mask, so that backward
            and a recomputation draw the same one.
        backend: see `graphmoe_kernels.backend`.

    Returns:
        c [N, F] in the dtype of ``gate`` and z [N, n*r]. Parameters of another float dtype are cast to it.

    Raises:
        TypeError: a floating tensor that is not, or integer ids that are not.
        ValueError: shapes that do not belong together, tensors on several devices, dropout outside [0, 1) or without
            a seed, a state without its folds, an unknown activation or backend.
    """
    get_activation(activation)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if dropout > 0 and seed is None:
        raise ValueError("dropout > 0 needs a seed: one int64 tensor, from which the mask is drawn")
    if len({state is None, fold_gate is None, fold_up is None}) != 1:
        raise ValueError("state, fold_gate and fold_up belong together: pass all three or none")
    _check_shapes(gate, up, low_gate, low_up, gate_B, up_B, down_A, weights, experts, state, fold_gate, fold_up)

    dtype = gate.dtype
    run = reference.expert_swiglu if resolve_backend(backend, "gate", gate) == "reference" else expert_swiglu_op
    with torch.autocast(gate.device.type, enabled=False):
        return run(
            gate,
            up.to(dtype),
            None if state is None else state.to(dtype),
            None if fold_gate is None else fold_gate.to(dtype),
            None if fold_up is None else fold_up.to(dtype),
            low_gate.to(dtype),
            low_up.to(dtype),
            gate_B.to(dtype),
            up_B.to(dtype),
            down_A.to(dtype),
            weights,
            experts,
            float(scale),
            activation,
            float(dropout) if seed is not None else 0.0,
            seed if dropout > 0 else None,
        )


def _check_shapes(
    gate: Tensor,
    up: Tensor,
    low_gate: Tensor,
    low_up: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    weights: Tensor,
    experts: Tensor,
    state: Tensor | None,
    fold_gate: Tensor | None,
    fold_up: Tensor | None,
) -> None:
    if gate.dim() != 2 or down_A.dim() != 3 or experts.dim() != 2:
        raise ValueError(
            "expected gate [tokens, F], down_A [experts, rank, F] and experts [tokens, k]; "
            f"got {list(gate.shape)}, {list(down_A.shape)} and {list(experts.shape)}"
        )
    tokens, width = gate.shape
    n, r, _ = down_A.shape
    k = experts.shape[1]
    inner = state.shape[-1] if state is not None else 0
    expected = {
        "gate": (gate, (tokens, width)),
        "up": (up, (tokens, width)),
        "low_gate": (low_gate, (tokens, n * r)),
        "low_up": (low_up, (tokens, n * r)),
        "gate_B": (gate_B, (n, width, r)),
        "up_B": (up_B, (n, width, r)),
        "down_A": (down_A, (n, r, width)),
        "weights": (weights, (tokens, k)),
        "experts": (experts, (tokens, k)),
        "state": (state, (tokens, inner)),
        "fold_gate": (fold_gate, (width, inner)),
        "fold_up": (fold_up, (width, inner)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for {tokens} tokens, F={width}, {n} experts of rank {r} and k={k}; "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != gate.device:
            raise ValueError(f"{name} is on {tensor.device}, gate on {gate.device}; put them on one device")
        if tensor.is_floating_point() == (name == "experts"):
            raise TypeError(f"{name} has dtype {tensor.dtype}; experts are integers, all else is floating point")
    if not 1 <= k <= n:
        raise ValueError(f"each token needs 1..{n} experts (there are {n}), got k={k}")
