"""The low-rank GRU step that joins two rounds of self-rethinking."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.backend import resolve_backend
from graphmoe_kernels.gru import reference

CANDIDATE_ACTIVATIONS = ("sigmoid", "tanh")


def gru_step(
    inputs: Tensor,
    state: Tensor | None,
    recurrent_gates: Tensor,
    recurrent_candidate: Tensor,
    candidate_bias: Tensor,
    *,
    candidate_activation: str = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """One step h -> h' of the rethinking GRU (GraphMoE, Eq. 5 and 6).

    With u = ``inputs`` split in three, z = sigmoid(u_z + W_z h), q = sigmoid(u_r + W_r h),
    c = sigma(u_o + W_o (q * h) + b_o) and h' = (1 - z) * h + z * c. Gates and state update run in fp32 at least.

    Args:
        inputs: [N, 3G], what the gates read from outside, in the order update, reset, candidate.
        state: [N, G], or None for h = 0 (the first round).
        recurrent_gates: [2G, G], the state's columns of W_z over those of W_r.
        recurrent_candidate: [G, G], the state's columns of W_o.
        candidate_bias: [G].
        candidate_activation: ``"sigmoid"`` (as the paper writes) or ``"tanh"``.
        backend: see `graphmoe_kernels.backend`.

    Returns:
        [N, G] in the dtype of ``inputs``.

    Raises:
        TypeError: ``inputs`` is not floating point.
        ValueError: shapes that do not belong together, tensors on several devices, an unknown activation or backend.
    """
    resolve_backend(backend, "inputs", inputs)
    if candidate_activation not in CANDIDATE_ACTIVATIONS:
        raise ValueError(f"unknown candidate_activation {candidate_activation!r}; expected 'sigmoid' or 'tanh'")
    if not inputs.is_floating_point():
        raise TypeError(f"inputs must be floating point, got {inputs.dtype}")
    if candidate_bias.dim() != 1:
        raise ValueError(f"candidate_bias must be [G], the GRU's width; got {list(candidate_bias.shape)}")
    tokens, width = inputs.shape[0] if inputs.dim() else 0, candidate_bias.shape[0]
    expected = {
        "inputs": (inputs, (tokens, 3 * width)),
        "state": (state, (tokens, width)),
        "recurrent_gates": (recurrent_gates, (2 * width, width)),
        "recurrent_candidate": (recurrent_candidate, (width, width)),
        "candidate_bias": (candidate_bias, (width,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for a GRU of width {width} (candidate_bias), got {list(tensor.shape)}"
            )
        if tensor.device != inputs.device:
            raise ValueError(f"{name} is on {tensor.device}, inputs on {inputs.device}; put them on one device")
    dtype = inputs.dtype
    with torch.autocast(inputs.device.type, enabled=False):
        return reference.step(
            inputs,
            None if state is None else state.to(dtype),
            recurrent_gates.to(dtype),
            recurrent_candidate.to(dtype),
            candidate_bias,
            candidate_activation,
        )
