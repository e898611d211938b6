"""The expert SwiGLU round on Triton: which kernels a call runs, forward and backward.

Forward and the tokens' backward run a program for every tile of tokens and split of F; the experts' backward one for
every tile of columns and split of the tokens. Splits are as many as keep every multiprocessor busy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphmoe_kernels.experts import stream
from graphmoe_kernels.experts.call import Call, cut, prepare, program_slots, scratch
from graphmoe_kernels.experts.operands import Inputs, Settings
from graphmoe_kernels.launching import launch, multiprocessors


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """c [N, F] and z [N, n*r], as a stream where that suits; see `graphmoe_kernels.expert_swiglu`."""
    call = prepare(inputs, settings)
    if stream.suits(call.size, call.inputs.gate.dtype):
        return stream.forward(call)
    return _forward(call)


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    """In one launch, with tiles of any mixture of experts."""
    from graphmoe_kernels.experts.triton_forward import forward_kernel

    size, gate = call.size, call.inputs.gate
    config = call.config("forward")
    c = torch.empty(size.tokens, size.width, dtype=gate.dtype, device=gate.device)
    z = torch.empty(size.tokens, size.num_experts * size.rank, dtype=gate.dtype, device=gate.device)
    tiles = math.ceil(size.tokens / config["BLOCK_M"])
    splits, split_width = call.splits(config, tiles)
    launch(
        forward_kernel,
        (tiles, splits),
        device=gate.device,
        **call.arguments,
        c=c,
        z=z,
        partial=scratch(gate, splits if splits > 1 else 0, size.tokens, size.columns),
        present=scratch(gate, tiles * splits, size.slots, size.num_experts + 1, dtype=torch.int32),
        tickets=_tickets(call, tiles),
        split_width=split_width,
        splits=splits,
        COLUMNS=size.columns,
        **config,
    )
    return c, z


def _tickets(call: Call, tiles: int) -> Tensor:
    given = call.settings.tickets
    return torch.zeros(tiles, dtype=torch.int32, device=call.device) if given is None else given


def backward(grad_c: Tensor, grad_z: Tensor, inputs: Inputs, settings: Settings, needed: list[bool]) -> Inputs:
    """The gradients of the ``needed`` floating inputs, in their places."""
    call = prepare(inputs, settings)
    asked = dict(zip(Inputs._fields, [*needed, False], strict=True))
    grad_c, grad_z = grad_c.contiguous(), grad_z.contiguous()
    grads, present = _backward_tokens(call, grad_c, grad_z)
    if asked["low_update"]:
        grads["low_update"] = grads["low"].clone()
    d_gate, d_up = grads["gate"], grads["up"]
    if call.inputs.update is not None:
        state, fold_gate, fold_up = call.inputs.update
        if asked["state"]:
            grads["state"] = torch.addmm(d_gate @ fold_gate, d_up, fold_up)
        if asked["fold_gate"]:
            grads["fold_gate"] = d_gate.T @ state
        if asked["fold_up"]:
            grads["fold_up"] = d_up.T @ state
    if any(asked[name] for name in ("gate_B", "up_B", "down_A", "gate_scale", "up_scale")):
        grads |= _backward_weights(call, grad_c, grad_z, present)
    return Inputs(*(grads.get(name) for name in Inputs._fields))  # type: ignore[arg-type]


def _backward_tokens(call: Call, grad_c: Tensor, grad_z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of gate, up, low and weights, and the tiles' lists of experts for the second kernel."""
    from graphmoe_kernels.experts.triton_backward_tokens import backward_tokens_kernel

    size, gate = call.size, call.inputs.gate
    config = call.config("backward_tokens")
    grads = {
        "gate": torch.empty(size.tokens, size.width, dtype=gate.dtype, device=gate.device),
        "up": torch.empty(size.tokens, size.width, dtype=gate.dtype, device=gate.device),
        "low": torch.empty(size.tokens, 2 * size.num_experts * size.rank, dtype=gate.dtype, device=gate.device),
        "weights": scratch(gate, size.tokens, size.slots),
    }
    tiles = math.ceil(size.tokens / config["BLOCK_M"])
    splits, split_width = call.splits(config, tiles)
    summed = splits if splits > 1 else 0
    present = scratch(gate, splits * tiles, size.slots, size.num_experts + 1, dtype=torch.int32)
    launch(
        backward_tokens_kernel,
        (tiles, splits),
        device=gate.device,
        **call.arguments,
        d_c=grad_c,
        d_z=grad_z,
        **{f"d_{name}": grad for name, grad in grads.items()},
        partial_gate=scratch(gate, summed, size.tokens, size.columns),
        partial_up=scratch(gate, summed, size.tokens, size.columns),
        partial_weights=scratch(gate, summed, size.tokens, size.slots_padded),
        present=present,
        tickets=torch.zeros(tiles, dtype=torch.int32, device=gate.device),
        split_width=split_width,
        splits=splits,
        COLUMNS=size.columns,
        **config,
    )
    return grads, present


def _backward_weights(call: Call, grad_c: Tensor, grad_z: Tensor, present: Tensor) -> dict[str, Tensor]:
    """Gradients of gate_B, up_B, down_A and the scale vectors, fp32.

    The lists of the tiles' experts were made for the tokens' kernel, so its BLOCK_M is that of this one too.
    """
    from graphmoe_kernels.experts.triton_backward_weights import backward_weights_kernel

    size, gate = call.size, call.inputs.gate
    config = call.config("backward_weights") | {"BLOCK_M": call.config("backward_tokens")["BLOCK_M"]}
    column_tiles = math.ceil(size.width / config["BLOCK_F"])
    slots = program_slots(config, multiprocessors(gate.device))
    splits, tiles = cut(math.ceil(size.tokens / config["BLOCK_M"]), column_tiles, slots)
    n, r, width = size.num_experts, size.rank, size.width

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(splits, *shape, dtype=torch.float32, device=gate.device)

    summed = {name: zeros(n, width, r) for name in ("gate_B", "up_B", "down_A")}
    scales = {name: zeros(n, width) for name in ("gate_scale", "up_scale") if call.inputs.scales is not None}
    launch(
        backward_weights_kernel,
        (column_tiles, splits),
        device=gate.device,
        **call.arguments,
        d_c=grad_c,
        d_z=grad_z,
        **{f"d_{name}": x for name, x in summed.items()},
        d_gate_scale=scales.get("gate_scale"),
        d_up_scale=scales.get("up_scale"),
        present=present,
        split_tiles=tiles,
        **config,
    )
    found = {name: x.sum(0) for name, x in (summed | scales).items()}
    return found | {"down_A": found["down_A"].mT}
