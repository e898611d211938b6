"""What every launch shares: configurations for every kernel there is, and kernels that no token count compiles anew."""

import importlib.util
import os
import subprocess
import sys
import threading

import pytest
import torch

from graphmoe_kernels import launching
from graphmoe_kernels.backend import standing_for

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


CPU = torch.device("cpu")
# Kernels that read no tensor of the activations' dtype.
OF_FP32 = ("routing_topk",)


def run_without_interpreter(code: str, **environment: str) -> str:
    """What ``code`` prints in a process of its own, in which Triton compiles."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=inherited | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_token_counts_are_not_compiled_into_kernels():
    """A runtime integer that follows the batch is in no kernel's cache key: two batches' launches share a kernel."""
    printed = run_without_interpreter("""
import torch
from graphmoe_kernels.aot.case import specialization
from graphmoe_kernels.backend import standing_for
from graphmoe_kernels.experts.operands import FLOATING, ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton import launch as experts
from graphmoe_kernels.gru.triton import launch as gru
from graphmoe_kernels.launching import recorded, stubbed
from graphmoe_kernels.routing.triton import launch as routing
from graphmoe_kernels.routing.triton import launch_backward

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

def run(tokens):
    x, router = empty(tokens, 64), empty(8, 64)
    logits, weights, ids = routing.route(x, router, None, 2, True)
    routing.topk_softmax(logits, 2, True)
    launch_backward.backward(weights, None, logits, ids, x, router, True, x.dtype, True)
    inputs, state = empty(tokens, 96), (empty(tokens, 64), empty(tokens, 32), empty(tokens, 32))
    out, candidate = gru.step(inputs, *state, empty(32, 32), empty(32), "tanh", True)
    gru.step_backward(out, inputs, *state[:2], candidate, empty(32, 32), empty(32), "tanh", True, True)

def run_experts(tokens):
    pair = GateUp(empty(tokens, 256), empty(tokens, 256))
    update = LowRankUpdate(empty(tokens, 32), empty(256, 32), empty(256, 32))
    ids = empty(tokens, 2, dtype=torch.int32)
    operands = ExpertOperands(pair, empty(tokens, 256), GateUp(empty(8, 256, 16), empty(8, 256, 16)),
                              empty(8, 16, 256), empty(tokens, 2, dtype=torch.float32), ids, update=update)
    hidden, low_down = experts.forward(operands, 2.0, "silu")
    experts.backward(hidden, low_down, operands, 2.0, "silu", frozenset(FLOATING))
    experts.swiglu_backward(experts.swiglu(pair, update, "silu"), pair, update, "silu", frozenset(FLOATING))

many = 1000, 1008, 3001
for call, counts in ((run, (1, 16, 17)), (run_experts, (1, 2)), (run_experts, (3, 16, 17)), (run_experts, many)):
    keys = []
    for tokens in counts:
        with standing_for("sm_90"), stubbed(), recorded() as launches:
            call(tokens)
        keys.append({specialization(each) for each in launches})
    print(*sorted({key[0] for key in keys[0]}), all(each == keys[0] for each in keys))
""")
    shared = {"swiglu_forward", "swiglu_backward", "True"}
    backward = {"experts_count_tuples", "experts_place_rows"}
    backward |= {f"experts_stream_{name}" for name in ("backward_tokens", "backward_weights", "sum_tokens")}
    of_layer = {"routing_forward", "routing_topk", "routing_backward", "routing_backward_router"}
    of_layer |= {"gru_forward", "gru_backward"}
    found = [set(line.split()) for line in printed.splitlines()]
    assert found == [
        of_layer | {"True"},
        shared | backward | {"experts_forward_token"},
        shared | backward | {"experts_forward"},
        shared | backward | {"experts_stream", "experts_stream_sum"},
    ]


@pytest.mark.parametrize("device", launching.DEVICE_CLASSES)
@pytest.mark.parametrize("operator", ["routing", "experts", "swiglu", "gru"])
def test_every_class_has_a_configuration(device, operator):
    """Each kernel has one for every size class and dtype class that it runs in, with blocks that are powers of two."""
    for kernel, sizes in launching.config_table(device, operator).items():
        assert kernel.startswith(f"{operator}_")
        alone = {"experts_stream": {"wide"}, "experts_forward": {"skinny"}}
        expected = next((own for name, own in alone.items() if kernel.startswith(name)), set(launching.SIZE_CLASSES))
        assert sizes.keys() == expected, kernel
        dtypes = {"float"} if kernel in OF_FP32 else set(launching.DTYPE_CLASSES)
        for by_dtype in sizes.values():
            assert by_dtype.keys() == dtypes, kernel
            for config in by_dtype.values():
                assert {"num_warps", "num_stages"} < config.keys(), kernel
                blocks = {name: size for name, size in config.items() if name.startswith("BLOCK_")}
                assert all(size & (size - 1) == 0 for size in blocks.values()), (kernel, config)
                if operator == "routing" and blocks["BLOCK_M"] == 1:  # a token at a time, without matrix units
                    del blocks["BLOCK_M"]
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
    from graphmoe_kernels.experts.triton.sizes import cut

    for tiles in (1, 4, 16, 24, 32, 48, 64, 128, 129):
        splits, pieces = cut(224, tiles, 132)
        assert (splits - 1) * pieces < 224 <= splits * pieces
        waves = -(-tiles * splits // 132)
        assert waves * pieces * 132 <= 1.25 * max(224 * tiles, 132), (tiles, splits, pieces)


def stand_in(name):
    """What `launch` needs of a kernel, which notes what it was called with."""
    calls = []

    class Kernel:
        __name__ = name
        arg_names = ("x", "size", "BLOCK_M")

        def __getitem__(self, grid):
            return lambda *args, **options: calls.append((grid, args, options))

    return Kernel(), calls


def test_a_record_has_every_argument_by_its_name_and_can_be_launched_again():
    """Benchmarks and compile cases read the record: whichever way an argument was given, it is there by its name."""
    kernel, calls = stand_in("some_kernel")
    x = torch.zeros(3)
    with launching.recorded() as outer:
        launching.launch(kernel, (2, 1), x, size=3, BLOCK_M=16, num_warps=4, device=CPU)
        with launching.recorded() as inner:
            launching.launch(kernel, [1], x, 5, device=CPU, BLOCK_M=32, num_warps=8)
            launching.launch(kernel, (0,), x, 5, device=CPU, BLOCK_M=32, num_warps=8)
    launching.launch(kernel, (1,), x, 5, device=CPU, BLOCK_M=32, num_warps=8)
    assert len(outer) == 2  # no program, no launch; and what is outside is in no record
    assert inner[0] == outer[1]
    first = outer[0]
    assert (first.name, first.grid, first.device) == ("some_kernel", (2, 1), CPU)
    assert list(first.arguments) == ["x", "size", "BLOCK_M"]
    assert first.arguments["x"] is x
    assert first.constants == {"BLOCK_M": 16}
    assert first.options == {"num_warps": 4}
    before = len(calls)
    first.again()
    grid, args, options = calls[before]
    assert (grid, args) == ((2, 1), ())
    assert options == {"x": x, "size": 3, "BLOCK_M": 16, "num_warps": 4}


def test_records_end_with_their_own_context():
    """Two equal, empty records side by side: the one that ends must not take the other with it."""
    kernel, _ = stand_in("some_kernel")
    with launching.recorded() as outer:
        with launching.recorded():
            pass
        launching.launch(kernel, (1,), 1, 2, 3, device=CPU)
    assert len(outer) == 1


def test_stubbed_launches_do_nothing_and_are_recorded():
    """The host's time without launches, and records of what is not to run."""
    kernel, calls = stand_in("some_kernel")
    with launching.stubbed(), launching.recorded() as launches:
        launching.launch(kernel, (1,), 1, 2, 3, device=CPU)
    assert (len(launches), len(calls)) == (1, 0)
    launching.launch(kernel, (1,), 1, 2, 3, device=CPU)
    assert len(calls) == 1


def test_records_hold_what_other_threads_launch():
    """A backward's launches come from autograd's threads."""
    kernel, _ = stand_in("some_kernel")
    with launching.recorded() as launches:
        thread = threading.Thread(target=launching.launch, args=(kernel, (1,), 1, 2, 3), kwargs={"device": CPU})
        thread.start()
        thread.join()
    assert len(launches) == 1


def test_what_only_stands_for_a_gpu_launches_nothing():
    """A forgotten stub must not run a kernel on tensors that have no memory, or on the CPU as if it were a GPU."""
    kernel, calls = stand_in("some_kernel")
    with standing_for("sm_80"):
        assert launching.device_class(CPU) == "sm_80"
        assert launching.multiprocessors(torch.device("meta")) == 108
        with pytest.raises(RuntimeError, match=r"some_kernel cannot run: cpu only stands for a GPU; use .*stubbed"):
            launching.launch(kernel, (1,), 1, 2, 3, device=CPU)
    assert calls == []
    assert launching.multiprocessors(CPU) == 4
