"""Tensors of more than 2^31 elements: every offset is 64 bits wide, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.checks import check_operator
from benchmarks.operators import OPERATORS
from graphmoe_kernels import expert_order
from graphmoe_kernels.cost import Sizes
from tests.gpu.layers import MARKS, free_gigabytes

pytestmark = MARKS

LLAMA = Sizes(4096, 14336, 409, dtype="bf16")
# tokens with which the largest operand exceeds 2^31 elements, and the memory that the check takes
CASES = {"experts": (160_000, 75), "routing": (540_000, 40), "gru": (1_750_000, 60)}


@pytest.mark.parametrize("name", CASES)
def test_more_elements_than_32_bits_count(name):
    """First, last and rows between against fp64; without 64-bit offsets the last rows are another token's."""
    tokens, gigabytes = CASES[name]
    free = free_gigabytes()
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free device memory, there are {free:.0f}")
    operator = next(o for o in OPERATORS if o.name == name and o.later == (name != "routing"))
    operands = operator.operands(replace(LLAMA, tokens=tokens), operator.later, torch.bfloat16, torch.device("cuda"))
    assert max(t.numel() for t in operands.values()) > 2**31
    if name == "experts":
        operands["order"] = expert_order(operands["experts"])
    found = check_operator(operator, operands, torch.bfloat16)
    assert found.fault is None, found.fault
