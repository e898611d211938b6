"""What a call of the layer takes besides time: device memory within stated bounds, and no wait for the device."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from benchmarks.devices import CudaDevice
from graphmoe_kernels.cost import Sizes
from tests.gpu.layers import MARKS, make, step

pytestmark = MARKS

TOKENS = 8192
WIDE = Sizes(256, 8192, 25, rounds=3, dtype="bf16")  # [N, F] is much the largest tensor
# Tensors [N, F] alive at once. Forward: P_1 (gate and up), a round's c, and H M^T of half of the columns.
FORWARD_WIDE = 4
# Training: P_1, c of three rounds, and in backward the gradients of c, of P_1, of its sum over the rounds, and one that
# is being added up.
TRAINING_WIDE = 2 + 3 + 1 + 2 + 2 + 1


def wide_bytes(sizes: Sizes) -> int:
    return TOKENS * sizes.intermediate * sizes.element


def narrow_bytes(sizes: Sizes) -> int:
    """What is [N, D] or smaller, by a generous count; less than half of one [N, F]."""
    low = sizes.experts * sizes.rank
    return TOKENS * (4 * sizes.hidden + 16 * (sizes.gru_width + 16) + 8 * low) * sizes.element + 2**24


@contextmanager
def no_synchronisation():
    """Inside, an operation that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inference_makes_no_wide_tensors_but_the_layers_own():
    """No expert's or slot's [N, F] intermediates: memory is flat in k and n."""
    layer = make(WIDE)
    ffn = layer.fused.eval()
    x, _ = layer.input(TOKENS)

    def infer():
        with torch.no_grad():
            return ffn(x)

    infer()
    peak = CudaDevice().peak_bytes(infer)
    assert peak <= FORWARD_WIDE * wide_bytes(WIDE) + narrow_bytes(WIDE)


def test_training_keeps_what_backward_cannot_compute_again():
    """P_1 and the rounds' c; gate, up and hidden of every slot are computed again."""
    layer = make(WIDE)
    ffn = layer.fused.train()
    x, _ = layer.input(TOKENS)
    upstream = torch.randn_like(x)
    step(layer, ffn, x, upstream)
    torch.cuda.synchronize()
    peak = CudaDevice().peak_bytes(lambda: step(layer, ffn, x, upstream))
    parameters = sum(t.numel() * 4 for t in layer.leaves().values())
    fold = 2 * 5 * WIDE.intermediate * (WIDE.gru_width + 16) * WIDE.element  # M, Q and their gradients
    allowed = TRAINING_WIDE * wide_bytes(WIDE) + 2 * narrow_bytes(WIDE) + 4 * parameters + 2 * fold
    assert peak <= allowed


@pytest.mark.parametrize("tokens", [1, 700])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_host_never_waits(tokens, rounds):
    """No .item(), no copy to the host, in forward and backward, evaluation and training."""
    layer = make(rounds=rounds, dtype="bf16")
    x, _ = layer.input(tokens)
    upstream = torch.randn_like(x)
    for training in (True, False):
        layer.fused.train(training)
        step(layer, layer.fused, x, upstream)  # compiles
        with torch.no_grad():
            layer.fused(x)
        torch.cuda.synchronize()
        with no_synchronisation():
            step(layer, layer.fused, x, upstream)
            with torch.no_grad():
                layer.fused(x)
