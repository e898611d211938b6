"""What every launch shares: configurations for every kernel there is, and kernels that no token count compiles anew."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from graphmoe_kernels import launching

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def run_without_interpreter(code: str, **environment: str) -> str:
    """What ``code`` prints in a process of its own, in which Triton compiles."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=inherited | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_token_counts_are_not_compiled_into_kernels():
    """A runtime integer that follows the batch is in no kernel's cache key: its names are those of parameters."""
    printed = run_without_interpreter("""
from graphmoe_kernels.experts.triton_backward_tokens import backward_tokens_kernel
from graphmoe_kernels.experts.triton_backward_weights import backward_weights_kernel
from graphmoe_kernels.experts.triton_forward import forward_kernel
from graphmoe_kernels.experts.triton_stream import stream_kernel, stream_sum_kernel
from graphmoe_kernels.experts.triton_tuples import count_tuples, place_tokens
from graphmoe_kernels.gru.triton_kernels import gru_backward, gru_forward
from graphmoe_kernels.routing.triton_kernels import route_backward, route_forward
from graphmoe_kernels.routing.triton_order import order_tokens

for kernel in (forward_kernel, backward_tokens_kernel, backward_weights_kernel, gru_forward, gru_backward,
               route_forward, route_backward, order_tokens, stream_kernel, stream_sum_kernel, count_tuples,
               place_tokens):
    print(kernel.fn.__name__, *(p.name for p in kernel.params if p.do_not_specialize))
""")
    found = {name: set(rest) for name, *rest in map(str.split, printed.splitlines())}
    assert len(found) == 12
    for name, free in found.items():
        assert {"tokens", "num_tokens", "positions"} & free, name
    for name in ("forward_kernel", "backward_tokens_kernel"):
        assert "splits" in found[name]
    assert "split_tiles" in found["backward_weights_kernel"]
    assert {"first_block", "end_block", "split_blocks", "first_split"} <= found["stream_kernel"]
    assert "splits" in found["stream_sum_kernel"]
    assert "blocks" in found["place_tokens"]


@pytest.mark.parametrize("device", launching.DEVICE_CLASSES)
@pytest.mark.parametrize("operator", ["routing", "experts", "gru"])
def test_every_class_has_a_configuration(device, operator):
    """Each kernel has one for every size class and dtype class that it runs in, with blocks that are powers of two."""
    for kernel, sizes in launching.config_table(device, operator).items():
        alone = kernel == "stream"  # of many tokens in half precision
        assert sizes.keys() == ({"wide"} if alone else set(launching.SIZE_CLASSES)), kernel
        for by_dtype in sizes.values():
            assert by_dtype.keys() == ({"half"} if alone else set(launching.DTYPE_CLASSES)), kernel
            for config in by_dtype.values():
                assert {"num_warps", "num_stages"} < config.keys(), kernel
                blocks = {name: size for name, size in config.items() if name.startswith("BLOCK_")}
                assert all(size & (size - 1) == 0 for size in blocks.values()), (kernel, config)
                if operator == "routing" and blocks["BLOCK_N"] == 1:  # a token at a time, without matrix units
                    del blocks["BLOCK_N"]
                assert all(size >= 16 for size in blocks.values()), (kernel, config)


def test_half_precision_is_refused_where_the_interpreter_would_get_it_wrong():
    """The stock interpreter computes with bfloat16's bits: an error, not garbage; float32 runs."""
    printed = run_without_interpreter(
        """
import torch
from graphmoe_kernels import topk_softmax_routing
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    try:
        topk_softmax_routing(torch.randn(3, 4, dtype=dtype), 2, backend="triton")
        print("ran")
    except ValueError as error:
        print(error)
""",
        TRITON_INTERPRET="1",
    )
    assert printed.splitlines()[0] == "ran"
    for line, dtype in zip(printed.splitlines()[1:], ("bfloat16", "float16"), strict=True):
        assert line == (
            f"logits is torch.{dtype}: Triton's interpreter computes bfloat16 wrong, so it runs float32 alone"
        )


def test_a_compiled_call_on_a_device_without_triton_says_so():
    """Tracing asks no device; the launch does, with the message of the eager call."""
    printed = run_without_interpreter("""
import torch
from graphmoe_kernels import gru_step
compiled = torch.compile(gru_step, backend="aot_eager")
try:
    compiled(torch.randn(4, 48), None, None, None, torch.randn(16, 16), torch.randn(16), backend="triton")
except Exception as error:
    print(type(error).__name__, error)
""")
    assert "runs on CUDA devices; move the tensors there or use backend='torch'" in printed


@torch.no_grad()
def test_work_is_cut_into_few_waves():
    """Programs come in multiples of what runs at once, or nearly: no second wave for a few of them."""
    from graphmoe_kernels.experts.call import cut

    for tiles in (1, 4, 16, 24, 32, 48, 64, 128, 129):
        splits, pieces = cut(224, tiles, 132)
        assert (splits - 1) * pieces < 224 <= splits * pieces
        waves = -(-tiles * splits // 132)
        assert waves * pieces * 132 <= 1.25 * max(224 * tiles, 132), (tiles, splits, pieces)
