"""What each kernel must move and compute, and the shortest time in which a device can do it.

Bytes and operations follow from the sizes; the traffic between the L2 cache and the multiprocessors follows from the
tiles that a kernel's configuration cuts its work into. The report of a GPU run and the predictions both read it here.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.experts.triton.sizes import cut, program_slots
from graphmoe_kernels.launching import SIZE_CLASSES, SKINNY_TOKENS, Config, config_table
from graphmoe_kernels.rethinking.folding import padded

KERNELS = (
    *("route_forward", "route_backward", "order_tokens", "gru_forward", "gru_backward"),
    *("forward_kernel", "backward_tokens_kernel", "backward_weights_kernel"),
)
# Where a kernel's configuration is: the operator's file, and the name in it.
CONFIG_NAMES = {
    "route_forward": ("routing", "forward"),
    "route_backward": ("routing", "backward"),
    "order_tokens": ("routing", "order"),
    "gru_forward": ("gru", "gru_forward"),
    "gru_backward": ("gru", "gru_backward"),
    "forward_kernel": ("experts", "forward"),
    "stream_kernel": ("experts", "stream"),
    "backward_tokens_kernel": ("experts", "backward_tokens"),
    "backward_weights_kernel": ("experts", "backward_weights"),
}
# Integer operations of one comparison of two tokens: the compare, the conversion and the addition.
ORDER_OPERATIONS = 3


class Work(NamedTuple):
    """One launch.

    Attributes:
        bytes: that must cross device memory: each input once, each output once.
        operations: floating-point (a multiply-add is two) as the kernel executes them, on the matrix units.
        l2_bytes: what the tiles read and write together, from the L2 cache at best.
        programs: how many there are.
        integer: integer operations, where they are the work.
    """

    bytes: float
    operations: float
    l2_bytes: float
    programs: int
    integer: float = 0.0


class Limits(NamedTuple):
    """What a device can do: bytes a second, bf16 operations a second, multiprocessors, their L2 and integer rates."""

    bandwidth: float
    matrix: float
    multiprocessors: int
    l2_bandwidth: float
    sm_bandwidth: float
    integer: float
    launch: float

    def times(self, work: Work) -> dict[str, float]:
        """Seconds that each limit alone asks for."""
        busy = min(work.programs, self.multiprocessors)
        return {
            "memory": work.bytes / self.bandwidth,
            "L2": work.l2_bytes / min(self.l2_bandwidth, busy * self.sm_bandwidth),
            "matrix": work.operations / (self.matrix * busy / self.multiprocessors),
            "integer": work.integer / (self.integer * busy / self.multiprocessors),
        }


def shipped_config(kernel: str, tokens: int, device: str = "sm_90", dtype_class: str = "half") -> Config:
    """The configuration that the package ships for a kernel at a token count."""
    operator, name = CONFIG_NAMES[kernel]
    size = SIZE_CLASSES[tokens > SKINNY_TOKENS]
    return config_table(device, operator)[name][size][dtype_class]


@functools.cache
def experts_per_tile(tokens: int, experts: int, top_k: int, block: int, ordered: bool) -> float:
    """Experts that a slot finds in a tile of ``block`` tokens, on average, with uniform routing from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices  # [N, k], by probability
    if ordered:
        low = chosen.sort(dim=1).values
        key = low[:, 0] * experts + (low[:, 1] if top_k > 1 else 0)
        chosen = chosen[key.argsort(stable=True)]
    tiles = chosen.split(block)
    return sum(tile[:, j].unique().numel() for tile in tiles for j in range(top_k)) / (len(tiles) * top_k)


def work(kernel: str, sizes: Sizes, later: bool, ordered: bool = True, sms: int = 132, device: str = "sm_90") -> Work:
    """The work of one launch of ``kernel`` at ``sizes`` with the configuration shipped for a device class.

    ``later``: in a round after the first; ``ordered``: with tokens in order (more than `SKINNY_TOKENS` ever are);
    ``sms``: the device's multiprocessors.

    Raises:
        ValueError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; expected one of {', '.join(KERNELS)}")
    dtype_class = "half" if sizes.element == 2 else "float"

    def config_of(name: str) -> Config:
        return shipped_config(name, sizes.tokens, device, dtype_class)

    config = config_of(kernel)
    if kernel.startswith("route"):
        return _routing(kernel, sizes, later, config)
    if kernel == "order_tokens":
        return _order(sizes, config)
    if kernel.startswith("gru"):
        return _gru(kernel, sizes, later, config)
    # The tiles of the experts' backward are those of the tokens' backward, whose lists of experts it reads.
    block = (config_of("backward_tokens_kernel") if kernel == "backward_weights_kernel" else config)["BLOCK_M"]
    return experts_work(kernel, sizes, later, config, block, ordered and sizes.tokens > SKINNY_TOKENS, sms)


def _routing(kernel: str, s: Sizes, later: bool, config: Config) -> Work:
    N, n, k = s.tokens, s.experts, s.top_k
    inner, tiles = padded(s.gru_width) if later else s.hidden, math.ceil(N / config["BLOCK_N"])
    rows = 4 * N * (n + 2 * k)  # logits, weights, experts
    if kernel == "route_backward":
        moved = 2 * rows + 4 * N * n
        return Work(moved, 0, moved, tiles)
    rows += 4 * N * n * later  # the first round's logits are added
    alone = config["BLOCK_N"] == 1  # a token at a time, without matrix units
    lanes = max(1 if alone else 16, 1 << (n - 1).bit_length())
    products = 3 if s.element == 2 and not alone else 1  # an fp32 router is three bf16 ones
    return Work(
        N * inner * s.element + 4 * n * inner + rows,
        2 * products * tiles * config["BLOCK_N"] * lanes * inner,
        N * inner * s.element + tiles * 4 * n * inner + rows,
        tiles,
    )


def _order(s: Sizes, config: Config) -> Work:
    tiles = math.ceil(s.tokens / config["BLOCK_N"])
    compared = s.tokens * min(s.tokens, 16384)
    return Work(
        4 * s.tokens * (s.top_k + 1),
        0,
        tiles * 4 * s.top_k * min(s.tokens, 16384),
        tiles,
        integer=ORDER_OPERATIONS * compared,
    )


def _gru(kernel: str, s: Sizes, later: bool, config: Config) -> Work:
    N, G, e = s.tokens, padded(s.gru_width), s.element
    tiles, columns = math.ceil(N / config["BLOCK_M"]), math.ceil(G / config["BLOCK_G"])
    weight = G * G * e * later
    if kernel == "gru_forward":
        own = N * G * e * (3 + 2 + 4 * later)  # inputs, out; recurrent, state, total
        again = N * G * e * 3 * later  # what the candidate's product reads: every column tile anew
    else:
        own = N * G * (e * (3 + 2 + 3 + (2 + 1 + 1) * later) + 4 * later)  # inputs, grad, d_inputs; ..., candidate
        again = N * G * (4 * e + 4) * later
    operations = 2 * tiles * config["BLOCK_M"] * G * G * later
    return Work(own + weight, operations, own + columns * again + tiles * weight, tiles * columns)


def experts_work(kernel: str, s: Sizes, later: bool, config: Config, block: int, ordered: bool, sms: int) -> Work:
    """The work of an expert kernel with tiles of ``block`` tokens and the columns of ``config``."""
    N, F, G, n, k, r, e = s.tokens, s.intermediate, padded(s.gru_width), s.experts, s.top_k, s.rank, s.element
    rank = max(16, 1 << (r - 1).bit_length())
    columns = max(16, 1 << (k * rank - 1).bit_length())
    tiles, blocks = math.ceil(N / block), math.ceil(F / config["BLOCK_F"])
    present = experts_per_tile(N, n, k, block, ordered)
    visits = tiles * k * present  # of an expert by a slot of a tile

    wide = {"forward_kernel": 3, "backward_tokens_kernel": 5, "backward_weights_kernel": 3}[kernel] * N * F * e
    low = N * 2 * k * r * e * (1 + later)
    fold = 2 * F * G * e * later
    low_matrices = 3 * F * r * e
    state = N * G * e * later
    sums = N * (n * r * e + 12 * k)
    width = {  # columns of the products with one expert's matrices
        "forward_kernel": 2 * rank + columns,
        "backward_tokens_kernel": 3 * rank + 2 * columns,
        "backward_weights_kernel": 3 * rank + 3 * rank,
    }[kernel]
    operations = 2 * tiles * block * 2 * F * G * later + 2 * visits * block * F * width
    bytes_ = wide + low + fold + s.used_experts * low_matrices + state + sums
    through = wide + tiles * fold + blocks * state + visits * low_matrices
    through += blocks * N * k * 2 * r * e * (1 + later) + sums  # a row reads its own expert's activations alone
    slots = program_slots(config, sms)
    programs = tiles * cut(blocks, tiles, slots)[0]
    if kernel == "backward_weights_kernel":
        splits = cut(tiles, blocks, slots)[0]
        programs = blocks * splits
        bytes_ += 4 * 3 * n * F * r * splits
        through += 2 * visits * 4 * 3 * F * r  # the running sums of an expert, read and written at each visit
    return Work(bytes_, operations, through, programs)
