"""Routing stays fp32 where PyTorch was told to multiply fp32 matrices with TF32, which only a GPU does."""

from __future__ import annotations

import pytest
import torch

from graphmoe_kernels import route_tokens
from graphmoe_kernels.testing import relative_error
from tests.gpu.layers import MARKS

pytestmark = MARKS


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("setting", ["high", "medium"])
def test_logits_and_gradients(setting: str, backend: str) -> None:
    """Against fp64: the error of an fp32 sum over 4096 columns; that of a plain product is hundreds of times larger."""
    x, router = torch.randn(512, 4096, device="cuda"), torch.randn(8, 4096, device="cuda") / 64
    upstream = torch.randn(512, 8, device="cuda")

    def routed() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, router)]
        logits = route_tokens(*leaves, 2, backend=backend).logits
        return [logits.detach(), *torch.autograd.grad(logits, leaves, upstream)]

    wide = [x.double(), router.double(), upstream.double()]
    exact = [wide[0] @ wide[1].T, wide[2] @ wide[1], wide[2].T @ wide[0]]
    plain = routed()
    torch.set_float32_matmul_precision(setting)
    try:
        assert relative_error(x @ router.T, exact[0]) > 1e-4
        lowered = routed()
    finally:
        torch.set_float32_matmul_precision("highest")
    for found, before, oracle in zip(lowered, plain, exact, strict=True):
        # Tensor cores round every sum that they add up down, where CUDA cores round to nearest.
        assert relative_error(found, oracle) <= 2 * relative_error(before, oracle) + 1e-6
