"""The expert SwiGLU round: base pre-activation, experts' low-rank terms, activation and combination in one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.backend import resolve_backend, without_autocast
from graphmoe_kernels.experts import reference
from graphmoe_kernels.experts.call import check_supported
from graphmoe_kernels.experts.op import expert_swiglu_op
from graphmoe_kernels.experts.operands import OPTIONAL, Inputs, Settings
from graphmoe_kernels.launching import SMALLEST_TILE
from graphmoe_kernels.validation import (
    INTEGER_DTYPES,
    check_device,
    check_dropout,
    check_floats,
    check_number,
    check_tensor,
)

# Tensors that the implementations take as they are: routing weights, and vectors whose distance from 1 matters.
OWN_DTYPE = ("weights", "experts", "gate_scale", "up_scale")


def expert_swiglu(
    gate: Tensor,
    up: Tensor,
    low: Tensor,
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
    low_update: Tensor | None = None,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    order: Tensor | None = None,
    tickets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """c = sum_j w_j act(g_j) * u_j and z = sum_j w_j A_D,e_j (act(g_j) * u_j) over a token's k slots.

    g_j = m_G,e_j * (``gate`` + ``state`` ``fold_gate``^T + s B_G,e_j a_G,e_j) + b_G, u_j likewise: the experts of
    MixLoRA, with their outputs combined before the (linear, shared) down projection. The caller gets y = W_D c + s B_D
    z. A rank of 0 leaves act(g) * u of what all slots share: ``state`` is then any update of low rank.

    Args:
        gate, up: [N, F], the frozen projections' output.
        low: [N, 2nr], A x of every expert, expert-major, for the gate projection and then for the up projection.
        gate_B, up_B: [n, F, r].
        down_A: [n, r, F].
        weights: [N, k]; experts: [N, k] integers in 0..n-1, distinct within a row. ``"torch"``, which counts them on
            the host, refuses others, and so does ``"reference"`` on the CPU. Triton does not read them back from the
            GPU: there an id that is none, or stands twice, makes its token NaN.
        scale: s = alpha / r.
        activation: a name of `graphmoe_kernels.ACTIVATIONS`.
        state, fold_gate, fold_up: [N, G], [F, G], [F, G]: the later rounds' update of the pre-activation; all or none.
        low_update: [N, 2nr], what a later round adds to ``low``, or None.
        gate_scale, up_scale: [n, F], the experts' scale vectors m (DoRA's magnitude over norm), in any float dtype;
            both or none.
        gate_bias, up_bias: [F], b, constants that no scale vector multiplies; both or none.
        dropout, seed: LoRA dropout on the input of ``down_A``; the seed (one int64, where ``gate`` is) names the mask
            (`graphmoe_kernels.experts.dropout`), so that backward and a recomputation draw the same one.
        order: [N] int32, a permutation of the tokens in which neighbours share experts (`expert_order`). It changes
            the Triton kernels' speed and nothing else; what is no permutation leaves tokens undefined.
        tickets: int32 zeros, ceil(N / 16) or more: counters of the Triton kernel, zero again when it ends
            (`Routing.tickets`); without them it makes its own.
        backend: see `graphmoe_kernels.backend`. Triton takes F * G and F * r below 2^31, and k times r (rounded up to a
            power of two, at least 16) up to 256.

    Returns:
        c [N, F] and z [N, n*r] in the dtype of ``gate``. Parameters of another float dtype are cast to it, all but the
        scale vectors. Row strides of activations are free; all else is made contiguous.

    Raises:
        TypeError: what is no dense tensor of fp64, fp32, fp16 or bf16, ids that are no integers, a scale or dropout
            that is no number.
        ValueError: shapes that do not belong together, F = 0, tensors on several devices, a scale that is not finite,
            dropout outside [0, 1) or without a seed, a state without its folds, one scale vector or bias, a bias that
            wants a gradient, an unknown activation, a backend that cannot run this; where ids are read, one outside
            of 0..n-1 or twice in a row.
    """
    get_activation(activation)
    check_number("scale", scale)
    check_dropout(dropout)
    if dropout > 0 and seed is None:
        raise ValueError("dropout > 0 needs a seed: one int64 tensor, from which the mask is drawn")
    if len({x is None for x in (state, fold_gate, fold_up)}) != 1:
        raise ValueError("state, fold_gate and fold_up belong together: pass all three or none")
    if (gate_scale is None) != (up_scale is None):
        raise ValueError("gate_scale and up_scale belong together: pass both or none")
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("gate_bias and up_bias belong together: pass both or none (zeros where there is none)")
    inputs = Inputs(
        gate,
        up,
        state,
        fold_gate,
        fold_up,
        low,
        low_update,
        gate_B,
        up_B,
        down_A,
        gate_scale,
        up_scale,
        weights,
        experts,
    )
    _check_shapes(inputs)
    _check_biases(gate, gate_bias, up_bias)
    _check_extras(gate, seed, order, tickets)
    resolved = resolve_backend(backend, "gate", gate)
    if resolved == "triton":
        check_supported(inputs, activation)

    if gate_bias is not None and up_bias is not None:
        gate_bias, up_bias = gate_bias.to(gate.dtype), up_bias.to(gate.dtype)
    drawn = seed if dropout > 0 else None
    settings = Settings(float(scale), activation, float(dropout), gate_bias, up_bias, drawn, order, tickets)
    with without_autocast(gate):
        inputs = inputs.map(lambda name, x: x if name in OWN_DTYPE else x.to(gate.dtype))
        if resolved == "reference":
            return reference.expert_swiglu(inputs, settings)
        return expert_swiglu_op(*inputs, *settings, resolved)


def _check_shapes(inputs: Inputs) -> None:
    gate, down_A, experts = inputs.gate, inputs.down_A, inputs.experts
    for name, tensor in zip(Inputs._fields, inputs, strict=True):
        if name != "experts" and not (tensor is None and name in OPTIONAL):
            check_floats(name, tensor)
    check_tensor("experts", experts)
    if experts.dtype not in INTEGER_DTYPES:
        raise TypeError(f"experts must be integers (int64, int32, int16, int8 or uint8), got {experts.dtype}")
    if gate.dim() != 2 or down_A.dim() != 3 or experts.dim() != 2:
        raise ValueError(
            "expected gate [tokens, F], down_A [experts, rank, F] and experts [tokens, k]; "
            f"got {list(gate.shape)}, {list(down_A.shape)} and {list(experts.shape)}"
        )
    tokens, width = gate.shape
    n, r, _ = down_A.shape
    k = experts.shape[1]
    inner = inputs.state.shape[-1] if inputs.state is not None and inputs.state.dim() else 0
    shapes: tuple[tuple[int, ...], ...] = (
        *((tokens, width), (tokens, width), (tokens, inner), (width, inner), (width, inner)),
        *((tokens, 2 * n * r), (tokens, 2 * n * r), (n, width, r), (n, width, r), (n, r, width)),
        *((n, width), (n, width), (tokens, k), (tokens, k)),
    )
    for name, tensor, shape in zip(Inputs._fields, inputs, shapes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for {tokens} tokens, F={width}, {n} experts of rank {r} (by down_A) and "
                f"k={k}; got {list(tensor.shape)}"
            )
        check_device(name, tensor, "gate", gate)
    if width == 0:
        raise ValueError(f"gate must be [tokens, F] with F of at least 1, got {list(gate.shape)}")
    if not 1 <= k <= n:
        raise ValueError(f"each token needs 1..{n} experts (there are {n}), got k={k}")


def _check_biases(gate: Tensor, *biases: Tensor | None) -> None:
    width = gate.shape[1]
    for name, bias in zip(("gate_bias", "up_bias"), biases, strict=True):
        if bias is None:
            continue
        check_floats(name, bias)
        if bias.shape != (width,):
            raise ValueError(f"{name} must be [{width}], as many as gate has columns, got {list(bias.shape)}")
        check_device(name, bias, "gate", gate)
        if bias.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} is a constant of this operator and gets no gradient; pass it detached")


def _check_extras(gate: Tensor, seed: Tensor | None, order: Tensor | None, tickets: Tensor | None) -> None:
    """What no backend may take on trust: a wrong one would be read past its end, or mean another mask elsewhere."""
    tokens = gate.shape[0]
    for name, tensor in (("seed", seed), ("order", order), ("tickets", tickets)):
        if tensor is not None:
            check_tensor(name, tensor)
            check_device(name, tensor, "gate", gate)
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(
            f"seed must be one int64, as of torch.randint(2**62, (1,)), got {seed.dtype} {list(seed.shape)}"
        )
    if order is not None and (order.dtype != torch.int32 or order.shape != (tokens,) or not order.is_contiguous()):
        raise ValueError(
            f"order must be int32 [{tokens}] and contiguous, a permutation of the tokens (expert_order makes one), "
            f"got {order.dtype} {list(order.shape)}"
        )
    least = -(-tokens // SMALLEST_TILE)
    if tickets is not None and (
        tickets.dtype != torch.int32 or tickets.dim() != 1 or len(tickets) < least or not tickets.is_contiguous()
    ):
        raise ValueError(
            f"tickets must be int32 zeros, {least} or more in one contiguous row, "
            f"got {tickets.dtype} {list(tickets.shape)}"
        )
