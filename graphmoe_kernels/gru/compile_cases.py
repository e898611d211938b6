"""The calls of the GRU step that are compiled ahead of time: every configuration, in a folded and a literal round."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from graphmoe_kernels.aot.case import DTYPES, SIZES, Variant, empty
from graphmoe_kernels.gru.triton import launch

HIDDEN = 4096
WIDTHS = {"folded": 416, "literal": 409}  # a fold's GRU is padded to a multiple of 16, the literal loop's is not


def variants() -> Iterator[Variant]:
    """Both kernels in first and later rounds, in inference and in training; tanh and fp16 in a later round's."""
    for size, tokens in SIZES.items():
        for dtype in DTYPES:
            matrix = ("gru_forward", "gru_backward") if size == "wide" and dtype != "fp32" else ()
            for loop, width in WIDTHS.items():
                call = partial(_step, tokens, width, DTYPES[dtype], loop == "folded")
                name = f"{size} {dtype} {loop}"
                yield Variant(f"{name}, later round, training", partial(call, "sigmoid", True, True), matrix)
                if dtype == "fp16":
                    continue
                yield Variant(f"{name}, later round", partial(call, "sigmoid", True, False), matrix)
                yield Variant(f"{name}, first round, training", partial(call, "sigmoid", False, True))
                if loop == "folded":
                    yield Variant(f"{name}, tanh, later round, training", partial(call, "tanh", True, True), matrix)


def _step(tokens: int, width: int, dtype: torch.dtype, folded: bool, activation: str, later: bool, train: bool) -> None:
    """A step, and in training its backward, on tensors cut from those that a layer holds."""
    own = partial(empty, dtype=dtype)
    # Folded: the states lie beside their sum, and W_o's columns for the state in a tensor of their own.
    state, total = own(tokens, 2 * width).split(width, dim=1) if later else (None, None)
    recurrent = own(tokens, 2 * width) if later else None
    weight = own(width, width) if folded else own(width, width + HIDDEN)[:, :width]
    inputs, bias = own(tokens, 3 * width), empty(width)
    _, candidate = launch.step(inputs, recurrent, state, total, weight, bias, activation, train)
    if train:
        gradient = own(tokens, 2 * width)
        launch.step_backward(gradient, inputs, recurrent, state, candidate, weight, bias, activation, later, True)
