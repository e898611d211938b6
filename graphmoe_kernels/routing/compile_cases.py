"""The calls of routing that are compiled ahead of time: at the sizes of Llama 3 8B, and at the limits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from graphmoe_kernels.aot.case import DTYPES, SIZES, Variant, empty
from graphmoe_kernels.launching import SKINNY_TOKENS
from graphmoe_kernels.routing.triton import launch
from graphmoe_kernels.routing.triton.launch_backward import PRODUCT_EXPERTS, backward

HIDDEN = 4096
GRU_WIDTH = 416  # what a folded round's router reads: a half of the states and their sum, side by side
# Experts, and experts per token: one, a prime, the most, and two that fill a block.
LIMITS = ((1, 1), (37, 3), (64, 6), (128, 8), (launch.MAX_EXPERTS, 8), (launch.MAX_EXPERTS, launch.MAX_EXPERTS))


def variants() -> Iterator[Variant]:
    """Every kernel with every configuration."""
    for size, tokens in SIZES.items():
        for dtype in DTYPES:
            for router in sorted({dtype, "fp32"}):
                for later in (False, True):
                    yield _forward(size, tokens, dtype, router, later)
        for n, k in ((8, 2), *LIMITS):
            for dtype in ("bf16", "fp32") if n != 8 else ():
                yield _forward(size, tokens, dtype, "fp32", True, n, k)
            yield _given_logits(size, tokens, n, k)
            yield _backward(size, tokens, n, k, wants=("logits",))
        for n, k in ((8, 2), *(limit for limit in LIMITS if limit[0] <= PRODUCT_EXPERTS)):
            for dtype in DTYPES if n == 8 else ("bf16", "fp32"):
                for router in sorted({dtype, "fp32"}):
                    yield _backward(size, tokens, n, k, dtype, router)
        yield _backward(size, tokens, 8, 2, given=("weights",), wants=("x",))
        yield _backward(size, tokens, 8, 2, given=("weights",), wants=("router",))  # no gradient of a model's input
        yield _backward(size, tokens, 8, 2, given=("logits",))
    odd = empty(SKINNY_TOKENS, 37, dtype=torch.bfloat16), empty(8, 37)
    yield Variant("skinny bf16, rows that are not aligned", partial(launch.route, *odd, None, 2, True))


def _forward(size: str, tokens: int, dtype: str, router: str, later: bool, n: int = 8, k: int = 2) -> Variant:
    width = GRU_WIDTH if later else HIDDEN
    x = empty(tokens, 2 * width if later else width, dtype=DTYPES[dtype])[:, :width]
    offset = empty(tokens, n) if later else None
    name = f"{size} x={dtype} router={router} {'later round' if later else 'first round'} n={n} k={k}"
    return Variant(name, partial(launch.route, x, empty(n, width, dtype=DTYPES[router]), offset, k, True))


def _given_logits(size: str, tokens: int, n: int, k: int) -> Variant:
    return Variant(f"{size} n={n} k={k}", partial(launch.topk_softmax, empty(tokens, n), k, True))


def _backward(
    size: str,
    tokens: int,
    n: int,
    k: int,
    dtype: str = "bf16",
    router: str = "fp32",
    given: tuple[str, ...] = ("weights", "logits"),
    wants: tuple[str, ...] = ("logits", "x", "router"),
) -> Variant:
    """Gradients of what is wanted, by those of what is given."""
    call = partial(
        backward,
        empty(tokens, k) if "weights" in given else None,
        empty(tokens, n) if "logits" in given else None,
        empty(tokens, n),
        empty(tokens, k, dtype=torch.int32),
        empty(tokens, HIDDEN, dtype=DTYPES[dtype]) if "router" in wants else None,
        empty(n, HIDDEN, dtype=DTYPES[router]) if "x" in wants else None,
        n == 8,
        DTYPES[dtype],
        "logits" in wants,
    )
    name = f"x={dtype} router={router} n={n} k={k} of {'+'.join(given)} to {'+'.join(wants)}"
    return Variant(f"{size} {name}", call)
