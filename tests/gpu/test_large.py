"""Tensors of more than 2^31 elements: every offset is 64 bits wide, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.operators import check_operator, find_operator
from graphmoe_kernels.cost import Sizes
from tests.gpu.layers import MARKS, free_gigabytes

pytestmark = MARKS

LLAMA = Sizes(4096, 14336, 409, dtype="bf16")
# tokens with which the largest operand exceeds 2^31 elements, its width, and the memory that the check takes
CASES = {"experts": (160_000, 14336, 75), "routing": (540_000, 4096, 40), "gru": (1_750_000, 3 * 416, 60)}


@pytest.mark.parametrize("name", CASES)
def test_more_elements_than_32_bits_count(name):
    """First, last and rows between against fp64; without 64-bit offsets the last rows are another token's."""
    tokens, width, gigabytes = CASES[name]
    free = free_gigabytes()
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free device memory, there are {free:.0f}")
    assert tokens * width > 2**31
    operator = find_operator(name, later=name != "routing")
    found = check_operator(operator, replace(LLAMA, tokens=tokens), torch.device("cuda"))
    assert found.fault is None, found.fault
