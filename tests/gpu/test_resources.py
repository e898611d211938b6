"""What a call of the layer takes besides time: device memory within stated bounds, and no wait for the device."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from benchmarks.gpu.devices import CudaDevice
from graphmoe_kernels.cost import Sizes
from tests.gpu.layers import MARKS, make, step

pytestmark = MARKS

TOKENS = 8192
WIDE = Sizes(1024, 3584, 102, rounds=3, dtype="bf16")
# Tensors [N, F] alive at once. Forward: P_1 (gate and up), a round's c and the one before.
FORWARD_WIDE = 4
# Training: P_1, c of three rounds, and in backward the gradients of c, of P_1 and of its sum over the rounds.
TRAINING_WIDE = 2 + 3 + 1 + 2 + 2


def wide_bytes(sizes: Sizes) -> int:
    return TOKENS * sizes.intermediate * sizes.element


def narrow_bytes(sizes: Sizes) -> int:
    """A generous count of what is [N, D] or smaller in all rounds, with the fp32 sums of the kernels' splits."""
    low = sizes.experts * sizes.rank
    return TOKENS * (6 * sizes.hidden + sizes.rounds * (24 * sizes.gru_width + 8 * low)) * sizes.element + 2**26


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
