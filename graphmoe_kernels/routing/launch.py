"""How the routing kernels are launched: outputs, block sizes, precision."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.launching import SMALLEST_TILE, Config, by_rows, kernel_config, launch, power_of_two

MAX_EXPERTS = 256  # a row's experts are handled in registers, all at once
STATISTICS = {None: 0, "topk": 1, "full": 2}

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _mask(token_mask: Tensor | None, statistics: str | None) -> Tensor | None:
    """What the kernels read of the mask: integers, as they do not read bool."""
    if token_mask is None or statistics is None:
        return None
    token_mask = token_mask.contiguous()
    return token_mask.view(torch.uint8) if token_mask.dtype == torch.bool else token_mask


def blocks(config: Config, num_experts: int) -> Config:
    """A kernel's configuration with BLOCK_E, which holds all experts.

    Beside it a block over tokens has no more than 2048 elements, but 16 rows, as matrix instructions take; so with more
    than 128 experts eight warps share what four cannot hold. A program of one token multiplies without them, and has a
    block over columns of 16,384 elements.
    """
    alone = config["BLOCK_N"] == 1
    block_experts = max(1 if alone else 16, power_of_two(num_experts))
    largest = max(1 if alone else 16, (16384 if alone else 2048) // block_experts)
    bounded = {name: min(size, largest) for name, size in config.items() if name.startswith("BLOCK_")}
    warps = max(config["num_warps"], 8) if block_experts > 128 else config["num_warps"]
    return {**config, **bounded, "BLOCK_E": block_experts, "num_warps": warps}


def allocate(main: Tensor, num_experts: int, top_k: int, stores_logits: bool, statistics: str | None) -> Outputs:
    """Uninitialised outputs of `forward`: what is not computed has no elements."""
    tokens = main.shape[0]
    counted = 0 if statistics is None else num_experts
    return (
        main.new_empty(tokens if stores_logits else 0, num_experts, dtype=torch.float32),
        main.new_empty(tokens, top_k, dtype=torch.float32),
        main.new_empty(tokens, top_k, dtype=torch.int32),
        main.new_empty(counted, dtype=torch.float32),
        main.new_empty(counted, dtype=torch.float32),
        main.new_empty((tokens + SMALLEST_TILE - 1) // SMALLEST_TILE, dtype=torch.int32),
    )


def forward(
    x: Tensor | None,
    router: Tensor | None,
    offset: Tensor | None,
    token_mask: Tensor | None,
    top_k: int,
    normalize: bool,
    statistics: str | None,
) -> Outputs:
    """logits, weights, experts, counts, mass, tickets; one launch, and two sums where statistics are asked for.

    ``x`` [N, D] comes with ``router`` [n, D]; without them ``offset`` [N, n] holds the logits, and where it is fp32
    the first output is empty.
    """
    from graphmoe_kernels.routing.triton_kernels import route_forward

    x, router, offset = (None if t is None else by_rows(t) for t in (x, router, offset))
    main, num_experts = main_input(x, router, offset)
    tokens = main.shape[0]
    stores_logits = x is not None or main.dtype != torch.float32
    logits, weights, experts, counts, mass, tickets = allocate(main, num_experts, top_k, stores_logits, statistics)
    config = blocks(kernel_config("routing", "forward", tokens, main.dtype, main.device), num_experts)
    programs = -(-tokens // config["BLOCK_N"])
    if statistics is not None:  # one row a program, summed in a fixed order
        counts, mass = (main.new_empty(programs, num_experts, dtype=torch.float32) for _ in range(2))
    mask = _mask(token_mask, statistics)
    launch(
        route_forward,
        (programs,),
        *(x, router, offset, mask, logits, weights, experts, counts, mass, tickets, tokens),
        0 if x is None else x.shape[1],
        *(0 if t is None else t.stride(0) for t in (x, router, offset)),
        device=main.device,
        HAS_X=x is not None,
        HAS_OFFSET=offset is not None,
        HAS_MASK=mask is not None,
        STORE_LOGITS=stores_logits,
        NORMALIZE=normalize,
        STATISTICS=STATISTICS[statistics],
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        TICKET_TOKENS=SMALLEST_TILE,
        BLOCK_S=power_of_two(top_k),
        **config,
    )
    if statistics is not None:
        counts, mass = counts.sum(0), mass.sum(0)
    return logits, weights, experts, counts, mass, tickets


def main_input(x: Tensor | None, router: Tensor | None, offset: Tensor | None) -> tuple[Tensor, int]:
    """The tensor that decides tokens, device and configuration, and the number of experts."""
    if x is not None and router is not None:
        return x, router.shape[0]
    assert offset is not None
    return offset, offset.shape[1]


def backward(
    d_logits: Tensor | None,
    d_weights: Tensor | None,
    d_mass: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    token_mask: Tensor | None,
    normalize: bool,
    statistics: str | None,
) -> Tensor:
    """The gradient of the logits, [N, n] fp32, from those of the outputs that have one."""
    from graphmoe_kernels.routing.triton_kernels import route_backward

    logits = by_rows(logits)
    upstream = [None if t is None else t.contiguous() for t in (d_logits, d_weights, d_mass)]
    tokens, num_experts = logits.shape
    total = logits.new_empty(tokens, num_experts, dtype=torch.float32)
    config = blocks(kernel_config("routing", "backward", tokens, logits.dtype, logits.device), num_experts)
    mask = None if d_mass is None else _mask(token_mask, statistics)
    launch(
        route_backward,
        (-(-tokens // config["BLOCK_N"]),),
        *(*upstream, logits, experts, mask, total, tokens, logits.stride(0)),
        device=logits.device,
        HAS_D_LOGITS=d_logits is not None,
        HAS_D_WEIGHTS=d_weights is not None,
        HAS_D_MASS=d_mass is not None,
        HAS_MASK=mask is not None,
        NORMALIZE=normalize,
        STATISTICS=STATISTICS[statistics],
        NUM_EXPERTS=num_experts,
        TOP_K=experts.shape[1],
        **config,
    )
    return total
