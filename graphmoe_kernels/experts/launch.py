"""The expert SwiGLU round on Triton: what the kernels are given, and how their work is cut.

Forward and the tokens' backward run a program for every tile of tokens and split of F; the experts' backward one for
every tile of columns and split of the tokens. Splits are as many as keep every multiprocessor busy.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.experts.dropout import kept_scale, threshold
from graphmoe_kernels.experts.operands import Inputs, Settings
from graphmoe_kernels.launching import Config, by_rows, kernel_config, launch, multiprocessors, power_of_two

# Columns of the compact low-rank rows (slots times padded rank) that a program can hold beside its tile.
MAX_COLUMNS = 256
# From so many columns on, a program's tile is smaller: the configurations named "..._wide_rank".
WIDE_RANK_COLUMNS = 64
# Warps of these kernels that a multiprocessor holds: they use all registers that a thread can have.
WARPS_PER_MULTIPROCESSOR = 8


def _padded(size: int) -> int:
    """The power of two that holds ``size``, at least 16: what a matrix instruction takes."""
    return max(16, power_of_two(size))


class Sizes(NamedTuple):
    """The sizes that the kernels are compiled for or called with."""

    tokens: int
    width: int
    num_experts: int
    rank: int
    slots: int

    @property
    def rank_padded(self) -> int:
        """A rank's columns in a matrix instruction."""
        return _padded(self.rank)

    @property
    def slots_padded(self) -> int:
        """The power of two that holds the slots, at least 2."""
        return max(2, power_of_two(self.slots))

    @property
    def columns(self) -> int:
        """Columns of compact rows: every slot's padded rank."""
        return _padded(self.slots * self.rank_padded)


def sizes(inputs: Inputs) -> Sizes:
    """The sizes of a call."""
    n, r, width = inputs.down_A.shape
    return Sizes(inputs.gate.shape[0], width, n, r, inputs.experts.shape[1])


def check_supported(inputs: Inputs, activation: str) -> None:
    """`ValueError` for what the kernels do not take, naming the argument and what works."""
    from graphmoe_kernels.triton_activations import NAMES

    size = sizes(inputs)
    if activation not in NAMES:
        raise ValueError(
            f"activation {activation!r} has no Triton form (there are {', '.join(NAMES)}); use backend='torch'"
        )
    if size.columns > MAX_COLUMNS:
        raise ValueError(
            f"k={size.slots} experts a token of rank {size.rank} (padded to {size.rank_padded}) need {size.columns} "
            f"columns, and the Triton kernels hold up to {MAX_COLUMNS}; lower top_k or r, or use backend='torch'"
        )
    inner = 0 if inputs.state is None else inputs.state.shape[1]
    if size.width * max(inner, size.rank) >= 2**31:
        raise ValueError(f"F={size.width} times G={inner} or r={size.rank} exceeds 2^31; use backend='torch'")


@functools.lru_cache(maxsize=4096)
def cut(work: int, others: int, slots: int) -> tuple[int, int]:
    """Into how many splits to cut ``work`` pieces beside ``others`` programs, and the pieces of one.

    ``slots`` programs run at once. The time is that of the waves times a program's pieces and half a piece for its
    beginning and end.
    """
    work = max(work, 1)
    pieces = min(range(1, work + 1), key=lambda p: math.ceil(others * math.ceil(work / p) / slots) * (p + 0.5))
    return math.ceil(work / pieces), pieces


def program_slots(config: Config, multiprocessors: int) -> int:
    """How many programs run at once: registers hold eight warps of these kernels on a multiprocessor."""
    return multiprocessors * max(1, WARPS_PER_MULTIPROCESSOR // config["num_warps"])


class Call(NamedTuple):
    """The arguments that all three kernels share."""

    size: Sizes
    inputs: Inputs
    settings: Settings
    arguments: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.inputs.gate.device

    def splits(self, config: Config, tiles: int) -> tuple[int, int]:
        """Into how many splits F is cut beside ``tiles`` programs, and the columns of one."""
        blocks = math.ceil(self.size.width / config["BLOCK_F"])
        splits, each = cut(blocks, tiles, program_slots(config, multiprocessors(self.device)))
        return splits, each * config["BLOCK_F"]

    def config(self, kernel: str) -> Config:
        """The configuration of a kernel for this call."""
        name = kernel + ("_wide_rank" if self.size.columns > WIDE_RANK_COLUMNS else "")
        return kernel_config("experts", name, self.size.tokens, self.inputs.gate.dtype, self.device)


def prepare(inputs: Inputs, settings: Settings) -> Call:
    """Layouts that the kernels can read, and the arguments that follow from sizes and settings."""
    size = sizes(inputs)
    by_row = ("gate", "up", "state", "low", "low_update")
    inputs = inputs.map(lambda name, x: by_rows(x) if name in by_row else x.contiguous())
    state, low_update = inputs.state, inputs.low_update
    dropping = settings.dropout > 0 and settings.seed is not None
    arguments = {
        **inputs._asdict(),
        "gate_bias": None if settings.gate_bias is None else settings.gate_bias.contiguous(),
        "up_bias": None if settings.up_bias is None else settings.up_bias.contiguous(),
        "order": settings.order,
        "seed": settings.seed if dropping else None,
        "tokens": size.tokens,
        "width": size.width,
        "inner": 0 if state is None else state.shape[1],
        "num_experts": size.num_experts,
        "stride_gate": inputs.gate.stride(0),
        "stride_up": inputs.up.stride(0),
        "stride_state": 0 if state is None else state.stride(0),
        "stride_low": inputs.low.stride(0),
        "stride_update": 0 if low_update is None else low_update.stride(0),
        "scale": settings.scale,
        "threshold": threshold(settings.dropout),
        "kept": kept_scale(settings.dropout),
        "SLOTS": size.slots,
        "SLOTS_PADDED": size.slots_padded,
        "RANK": size.rank,
        "RANK_PADDED": size.rank_padded,
        "ACTIVATION": settings.activation,
        "HAS_STATE": state is not None,
        "HAS_UPDATE": low_update is not None,
        "HAS_SCALE": inputs.gate_scale is not None,
        "HAS_BIAS": settings.gate_bias is not None,
        "HAS_ORDER": settings.order is not None,
        "DROPOUT": dropping,
    }
    return Call(size, inputs, settings, arguments)


def _scratch(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """c [N, F] and z [N, n*r] in one launch; see `graphmoe_kernels.expert_swiglu`."""
    from graphmoe_kernels.experts.triton_forward import forward_kernel

    call = prepare(inputs, settings)
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
        partial=_scratch(gate, splits if splits > 1 else 0, size.tokens, size.columns),
        present=_scratch(gate, tiles * splits, size.slots, size.num_experts + 1, dtype=torch.int32),
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
        "weights": _scratch(gate, size.tokens, size.slots),
    }
    tiles = math.ceil(size.tokens / config["BLOCK_M"])
    splits, split_width = call.splits(config, tiles)
    summed = splits if splits > 1 else 0
    present = _scratch(gate, splits * tiles, size.slots, size.num_experts + 1, dtype=torch.int32)
    launch(
        backward_tokens_kernel,
        (tiles, splits),
        device=gate.device,
        **call.arguments,
        d_c=grad_c,
        d_z=grad_z,
        **{f"d_{name}": grad for name, grad in grads.items()},
        partial_gate=_scratch(gate, summed, size.tokens, size.columns),
        partial_up=_scratch(gate, summed, size.tokens, size.columns),
        partial_weights=_scratch(gate, summed, size.tokens, size.slots_padded),
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
