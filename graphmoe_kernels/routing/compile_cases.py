"""The calls of routing that are compiled ahead of time: at the sizes of Llama 3 8B, and at the limits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from graphmoe_kernels.aot.case import DTYPES, SIZES, Variant, empty
from graphmoe_kernels.launching import SKINNY_TOKENS
from graphmoe_kernels.routing.triton import launch

HIDDEN = 4096
GRU_WIDTH = 416  # what a folded round's router reads: a half of the states and their sum, side by side
# Experts, and experts per token: one, a prime, the most, and two that fill a block.
LIMITS = ((1, 1), (37, 3), (64, 6), (128, 8), (launch.MAX_EXPERTS, 8), (launch.MAX_EXPERTS, launch.MAX_EXPERTS))

_PRODUCTS = [
    *[(dtype, router, n, "both") for dtype in DTYPES for router in sorted({dtype, "fp32"}) for n in (8, 64)],
    *[(dtype, "fp32", n, "both") for dtype in ("bf16", "fp32") for n in (1, 37, 128, launch.MAX_EXPERTS)],
    *[(dtype, "fp32", 8, case) for dtype in ("bf16", "fp32") for case in ("x alone", "router alone")],
]


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
            yield _backward(size, tokens, n, k, normalize=n == 8)
        yield _backward(size, tokens, 8, 2, normalize=True, logits=False)
        for dtype, router, n, case in _PRODUCTS:
            yield _products(size, tokens, dtype, router, n, case)
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


def _backward(size: str, tokens: int, n: int, k: int, normalize: bool, logits: bool = True) -> Variant:
    d_logits = empty(tokens, n) if logits else None
    ids = empty(tokens, k, dtype=torch.int32)
    call = partial(launch.backward, empty(tokens, k), d_logits, empty(tokens, n), ids, normalize)
    return Variant(f"{size} n={n} k={k} normalize={normalize} logits' own gradient={logits}", call)


def _products(size: str, tokens: int, dtype: str, router: str, n: int, case: str) -> Variant:
    x, weight = empty(tokens, HIDDEN, dtype=DTYPES[dtype]), empty(n, HIDDEN, dtype=DTYPES[router])
    given = None if case == "x alone" else x, None if case == "router alone" else weight
    call = partial(launch.products, empty(tokens, n), *given, DTYPES[dtype])
    return Variant(f"{size} x={dtype} router={router} n={n} gradients of {case}", call)
