"""The sizes of a call of the experts' Triton kernels, and how its work is cut."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from graphmoe_kernels.activations import check_triton_form
from graphmoe_kernels.experts.operands import ExpertOperands, LowRankUpdate
from graphmoe_kernels.launching import Config

# Columns of the compact low-rank rows (slots times padded rank) that a program can hold beside its tile.
MAX_COLUMNS = 256
# From so many columns on, a program's tile is smaller: the configurations named "..._wide_rank".
WIDE_RANK_COLUMNS = 64
# A stream's pieces and splits of F are whole blocks of so many columns, whatever its kernels take at a time.
STREAM_BLOCK = 64
# A token's experts share a tile where each pair of them has so many tokens on average. A pair is padded by half a tile,
# of 32 in the forward, so that there are no more rows of padding than tokens; with one expert per tile a token is read
# twice, and what its rows give is written and read once more: 2.6 times the bytes. Measured on an H100 with 18 tokens
# per pair and 75% padding: the forward is 2.3 times as fast as tiles of any experts.
PAIR_TOKENS = 16
# The kernels that put rows together read a count of every pair.
MAX_PAIRS = 255
# Where each expert has so many tokens of a slot on average, a token's two slots are launches of their own: the second
# adds to what the first has written. Rows of both in one launch are written to a buffer that another reads: in units of
# [N, F], 5 where these take 3, of hidden and of each gradient of the pre-activations. For that an expert's rows are
# padded once for each slot, by half a tile of 32.
SLOT_TOKENS = 32
# Columns of a tile's low-rank rows, with which what it reads of two experts fits in registers and shared memory.
MAX_PAIR_COLUMNS = 32
# Splits of F whose sums a program of few tokens adds up; the sums of so many are added by another.
SUMMED_AT_ONCE = 16
# Registers of a multiprocessor, and the most that a thread can have: so many are assumed where a configuration has no
# bound.
REGISTERS, MAX_REGISTERS = 2**16, 255


# The next two are called by kernels too, as constexpr functions (`tile`), and Triton lets those call no other.


def padded_rank(rank: int) -> int:
    """A rank's columns in a matrix instruction: the power of two that holds them, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def compact_columns(slots: int, rank: int) -> int:
    """Columns of compact rows, which hold every slot's padded rank: a power of two."""
    return 1 << (slots * max(16, 1 << (rank - 1).bit_length()) - 1).bit_length()


class Sizes(NamedTuple):
    """The sizes that the kernels are compiled for or called with."""

    tokens: int
    width: int
    num_experts: int
    rank: int
    slots: int

    @property
    def columns(self) -> int:
        """Columns of compact rows."""
        return compact_columns(self.slots, self.rank)


class Tiling(NamedTuple):
    """How a stream cuts tokens into rows whose tiles share their experts.

    Attributes:
        experts: of a tile: all of a token's, one or two, or else one.
        rows: of a token: 1, or one for each of its slots.
        tuples: how many different tuples of experts a tile can have.
        launches: of a kernel over all tiles: 1, or 2 where a launch has the tiles of one slot.
    """

    experts: int
    rows: int
    tuples: int
    launches: int = 1

    @property
    def rows_together(self) -> int:
        """Rows of a token in one launch: of several each is written apart, and they are summed after it."""
        return self.rows // self.launches


def tiling(size: Sizes) -> Tiling:
    """One row for a token where its experts make few tuples for so many tokens, else one for each slot."""
    pairs = math.comb(size.num_experts, 2)
    if (
        size.slots == 2
        and size.columns <= MAX_PAIR_COLUMNS
        and pairs <= MAX_PAIRS
        and size.tokens > PAIR_TOKENS * pairs
    ):
        return Tiling(2, 1, pairs)
    apart = size.slots == 2 and size.tokens >= SLOT_TOKENS * size.num_experts
    return Tiling(1, size.slots, size.num_experts, 2 if apart else 1)


def sizes(operands: ExpertOperands) -> Sizes:
    """The sizes of a call."""
    n, r, width = operands.down_A.shape
    tokens, slots = operands.expert_ids.shape
    return Sizes(tokens, width, n, r, slots)


def inner(update: LowRankUpdate | None) -> int:
    """G of an update; 0 without one."""
    return 0 if update is None else update.state.shape[1]


def check_sizes(size: Sizes, inner: int, activation: str) -> None:
    """Raise `ValueError` for what the kernels do not take, naming the argument and what works.

    ``inner`` is G of an update of the pre-activations, 0 without one.
    """
    check_triton_form(activation)
    if size.columns > MAX_COLUMNS:
        raise ValueError(
            f"k={size.slots} experts per token of rank {size.rank} (padded to {padded_rank(size.rank)}) need "
            f"{size.columns} columns, and the Triton kernels hold up to {MAX_COLUMNS}; lower top_k or r, or use "
            "backend='torch'"
        )
    check_offsets(size.width, inner, size.rank)


def check_offsets(width: int, inner: int, rank: int = 0) -> None:
    """Raise `ValueError` where an offset within one matrix of [F, G] or [F, r] exceeds 32 bits."""
    if width * max(inner, rank) >= 2**31:
        raise ValueError(f"F={width} times G={inner} or r={rank} exceeds 2^31; use backend='torch'")


@functools.lru_cache(maxsize=4096)
def cut(work: int, others: int, slots: int, most: int | None = None) -> tuple[int, int]:
    """Into how many splits to cut ``work`` pieces beside ``others`` programs, ``most`` at most, and the pieces of one.

    ``slots`` programs run at once. The time is that of the waves times a program's pieces and half a piece for its
    beginning and end. The pieces of a split are the least for so many splits, ``ceil(work / splits)``, so that a kernel
    knows them by the number of its programs.
    """
    work = max(work, 1)
    fewest = 1 if most is None else math.ceil(work / most)
    pieces = min(range(fewest, work + 1), key=lambda p: math.ceil(others * math.ceil(work / p) / slots) * (p + 0.5))
    return math.ceil(work / pieces), pieces


def program_slots(config: Config, multiprocessors: int) -> int:
    """How many programs run at once: as many as have their registers."""
    of_warp = 32 * config.get("maxnreg", MAX_REGISTERS)
    return multiprocessors * max(1, REGISTERS // of_warp // config["num_warps"])
