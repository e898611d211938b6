"""What is known before a measurement: the page of predictions, and the work of layers and kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.latency import DEVICES, calibration, chain_seconds, passes_of
from benchmarks.operators import find_operator
from benchmarks.predictions import PAGE, beside, main, predicted
from benchmarks.tuning import cells
from benchmarks.work import KERNELS, Work, kernel_work, layer_work, operator_work
from graphmoe_kernels.aot.cycles import issue_cycles, program_cycles
from graphmoe_kernels.aot.listing import Loop
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import Launch
from graphmoe_kernels.rethinking.policy import fold_break_even
from tests.benchmarks.made_up import CPU, LIMITS, document, gru_kernel, row

LLAMA_8B = Sizes(4096, 14336, 409, rounds=3, tokens=8192, dtype="bf16")


def test_a_result_stands_beside_its_prediction():
    """Kernels and layers of the sizes that are predicted; those of a CPU, of other experts or names are none."""
    kernel = gru_kernel("later", 1e-4)
    others = [gru_kernel("later", 1.0, experts=5), gru_kernel("later", 1.0, kernel="nonesuch")]
    rows = [row("triton", 6e-3), row("dense", 4e-3, rounds=1), row("triton", 1.0, model="qwen3-4b")]
    _, lines = beside(document(rows, kernels=[kernel, *others]))
    assert [line[0] for line in lines] == ["gru_forward, later round, 8,192 tokens, n=8", rows[0]["case"]]
    time, limit = predicted()["gru_forward", "later", 8192, 8]
    assert lines[0][2:] == [limit, "100 us", f"{1e-4 / time:.2f}"]
    time, _ = predicted()["H200", "inference", 8192, 3, 8]  # the made-up device is one
    assert lines[1][-1] == f"{6e-3 / time:.2f}"
    assert beside(document(rows, CPU, kernels=[kernel]))[1] == []


@pytest.mark.parametrize("experts", [8, 64])
def test_a_kernels_prediction_is_of_all_its_launches_in_a_round(experts):
    """A result times them together. The two launches of a later round's stream stood beside the prediction of one, and
    the GRU's backward in a later round, which multiplies, beside that of the first, which does not."""
    found, text = predicted(), PAGE.read_text(encoding="utf-8")
    step = text.split(f"Training step, 8192 tokens, n={experts}: ")[1].split("##")[0].split("\n\n")[1]
    whole = {
        name: float(us.replace(",", "")) for name, us in re.findall(r"\| (experts_\w+) \| \d+ \| ([\d,.]+) \|", step)
    }
    assert {"experts_stream", "experts_stream_backward_tokens", "experts_stream_backward_weights"} <= whole.keys()
    for kernel, us in whole.items():  # of three rounds
        first, later = (1e6 * found[kernel, name, 8192, experts][0] for name in ("first", "later"))
        assert first + 2 * later == pytest.approx(us, abs=0.2)
    assert found["gru_backward", "later", 8192, experts][0] > 2 * found["gru_backward", "first", 8192, experts][0]


def test_every_line_that_the_page_has_is_read():
    """One that is written otherwise would be left out in silence."""
    found = predicted()
    assert {key[0] for key in found if len(key) == 4} >= set(KERNELS)
    for device in ("H100", "H200", "A100"):
        for n in (8, 64):
            assert {(device, "inference", tokens, 3, n) for tokens in (1, 16, 64, 512, 2048, 8192)} <= found.keys()
            assert {(device, "training", tokens, t, n) for tokens in (2048, 8192) for t in (1, 2, 3)} <= found.keys()


def test_the_page_is_what_its_generator_gives():
    """`python -m benchmarks.predictions --write` makes it again; kernels, configurations or readings have changed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.predictions"]
    made = subprocess.run(command, cwd=PAGE.parents[1], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    again = "the page is of other kernels; make it again: python -m benchmarks.predictions --write"
    assert made.stdout == PAGE.read_text(encoding="utf-8"), again


def test_the_latency_model_keeps_to_what_was_measured():
    """The kernels that it was fitted to within 15%, the stream's prototype within 30%."""
    for each in calibration():
        assert each.predicted() == pytest.approx(each.measured, rel=0.3 if "prototype" in each.what else 0.15)


@pytest.mark.parametrize("inner, passes", [(0, [1, 1, 4, 4, 1]), (416, [1, 1, 7, 4, 4, 1])])
def test_passes_of_the_kernel_of_few_tokens(inner, passes):
    """Zeros and sums once; M in a later round; visits, each of two experts, to the 8 that are drawn."""
    zeros, loads = Loop(1, 0, 5, 5, 0, 0, 0, 9, ()), Loop(1, 0, 9, 9, 4, 0, 0, 99, ())
    loops = [Loop(0, len(passes) - 1, 7, 7, 9, 0, 0, 30, ()), zeros, *[loads] * (len(passes) - 2)]
    constants = {"BLOCK_M": 16, "BLOCK_K": 64, "AT_ONCE": 2, "SLOTS": 2}
    launch = Launch(SimpleNamespace(__name__="experts_forward"), (1, 224), {"inner": inner, **constants}, {}, None)
    assert passes_of(launch, loops, Sizes(4096, 14336, 409, experts=8, top_k=2, rank=16, tokens=16)) == passes


@pytest.mark.parametrize("router, passes", [(None, [1, 6]), ("router", [1, 6, 64])])
def test_passes_of_the_backward_of_routing(router, passes):
    """A pass for each of a token's experts, then one for each block of columns, where x has a gradient."""
    loops = [Loop(0, len(passes) - 1, 7, 7, 9, 0, 0, 30, ()), *[Loop(1, 0, 9, 9, 4, 0, 0, 99, ())] * (len(passes) - 1)]
    kernel = SimpleNamespace(__name__="routing_backward")
    launch = Launch(kernel, (256, 1), {"router": router, "blocks": 64, "TOP_K": 6}, {}, None)
    assert passes_of(launch, loops, LLAMA_8B) == passes


def test_a_program_waits_for_each_of_its_loads():
    """A loop in a loop, by hand: loads that nothing hides cost their latency, resident blocks share it, waves add."""
    chain = Loop(1, 1, 10, 10, 1, 0, 0, 20, ((15, 5),))
    # Issued at the end of the pass before, waited for at this one's.
    inner = Loop(2, 0, 5, 8, 1, 0, 0, 10, ((9, 9 - 10),))
    alone = Loop(0, 2, 7, 7, 0, 0, 0, 30, ())
    loops, passes = [alone, chain, inner], [1.0, 3.0, 4.0]
    assert program_cycles(loops, passes, 100) == 30 + 3 * ((20 + 100 - 10) + 3 * 100)
    assert issue_cycles(loops, passes) == 7 + 3 * (10 + 3 * 8)
    h100 = DEVICES[0]
    assert chain_seconds(h100, 132 * 2, 2, 1755) == pytest.approx(1e-6)
    assert chain_seconds(h100, 132 * 2 + 1, 2, 1755) == pytest.approx(2e-6)


def test_a_kernel_whose_loops_run_nobody_knows_how_often_is_refused_by_name():
    """One pass in place of hundreds would be a prediction like any other."""
    alone, loop = Loop(0, 1, 7, 7, 0, 0, 0, 30, ()), Loop(1, 0, 5, 8, 1, 0, 0, 10, ())
    unknown = SimpleNamespace(name="nonesuch_forward", arguments={"width": 64}, constants={"BLOCK_F": 32}, grid=(1, 1))
    assert passes_of(unknown, [alone], LLAMA_8B) == [1.0]
    with pytest.raises(LookupError, match="nonesuch_forward has loops"):
        passes_of(unknown, [alone, loop], LLAMA_8B)


def test_a_product_takes_what_its_limit_measured():
    """The size that the product rate is measured on takes its operations over that rate; one row takes its bytes."""
    h100, bytes_ = DEVICES[0], 2 * (8192 * 4096 + 4096 * 14336 + 8192 * 14336)
    operations = 2 * 8192 * 4096 * 14336
    assert h100.product_seconds(operations, bytes_) == pytest.approx(operations / h100.product)
    assert h100.product_seconds(2 * 4096 * 14336, 2 * 4096 * 14336) == 2 * 4096 * 14336 / h100.copy


def test_limits_are_floors():
    """8192 tokens through the dense MLP: 3.6 ms of products at 800 TFLOP/s, by hand; one token reads its weights."""
    dense = replace(LLAMA_8B, rounds=1)
    times = layer_work("dense", dense, False).times({"limits": LIMITS})
    assert times["matrix"] == pytest.approx(3 * 2 * 8192 * 4096 * 14336 / 8e14)
    times = layer_work("dense", replace(dense, tokens=1), False).times({"limits": LIMITS})
    assert times["memory"] == pytest.approx(3 * 2 * 4096 * 14336 / 4e12, rel=0.01)


def launched(name, *tensors):
    return SimpleNamespace(name=name, arguments={"operands": tensors, "numbers": 3})


def test_a_kernels_work_is_that_of_its_tensors_and_products():
    """Each tensor once, however often it is given; of the experts' matrices those that the tokens chose."""
    sizes = replace(LLAMA_8B, tokens=1)
    x, experts = torch.zeros(1, 64), torch.zeros(8, 32, 16)
    work = kernel_work([launched("experts_forward", x, (experts, x)), launched("experts_forward", x)], sizes, False)
    assert work.bytes == 4 * (64 + 8 * 32 * 16 * 2 / 8)  # top-2 of 8
    assert work.operations == operator_work("expert_swiglu", sizes, False, False).operations
    later = kernel_work([launched("experts_forward", x)], sizes, True).operations - work.operations
    assert later == 2 * 2 * 14336 * 409  # H M^T
    assert kernel_work([launched("experts_stream", x)], sizes, True).operations == work.operations
    of_weights = kernel_work([launched("experts_stream_backward_weights", x)], sizes, True).operations
    assert of_weights == 2 * work.operations  # its slots again, and a gradient for each of their products
    assert kernel_work([launched("routing_topk", x)], sizes, False) == Work(4 * 64, 0.0)


def test_every_kernel_with_products_is_known():
    """By the names of the configurations: one that is missed would be shown as if it computed nothing."""
    names = {cell.kernel.removesuffix("_wide_rank").removesuffix("_unaligned") for cell in cells()}
    assert names == set(KERNELS)


@pytest.mark.parametrize("later", [False, True])
def test_an_operators_bytes_are_those_of_its_tensors(later):
    """The cost model's count, against what the operator is given and gives: rounding and fp32 statistics aside."""
    sizes = replace(LLAMA_8B, hidden=256, intermediate=512, gru_width=256, tokens=512)
    for group, name in (("expert_swiglu", "experts"), ("gru_step", "gru"), ("routing", "routing")):
        operator = find_operator(name, later)
        operands = operator.operands(sizes, torch.device("cpu"))
        given = {key: t for key, t in operands.items() if key not in ("low", "low_update")}  # k*r of n*r are read
        outputs = operator.run(operands, 2, "torch")
        moved = sum(t.numel() * t.element_size() for t in [*given.values(), *outputs.values()])
        assert operator_work(group, sizes, later, False).bytes == pytest.approx(moved, rel=0.2)


def test_the_break_even_is_that_of_the_layers_kind():
    """With DoRA a fold saves less, so a training step of the tokens in between is a literal one."""
    sizes = replace(LLAMA_8B, dora=True)
    widths = (sizes.hidden, sizes.intermediate, 416, sizes.rounds)
    plain, dora = fold_break_even(*widths), fold_break_even(*widths, dora=True)
    assert plain != dora
    between = replace(sizes, tokens=int((plain + dora) / 2))
    assert layer_work("folded", between, True) == layer_work("literal" if plain < dora else "folded", between, True)
    beyond = replace(sizes, tokens=int(max(plain, dora)) + 1)
    assert layer_work("folded", beyond, True) != layer_work("literal", beyond, True)


def test_help_says_what_the_command_does(capsys):
    """It printed a usage line and ended with status 1."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "--write" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["--wirte"])
    assert end.value.code == 2
