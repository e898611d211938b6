"""What is known before a measurement: the page of predictions, and the work of layers and kernels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.operators import find_operator
from benchmarks.predictions import beside, predicted
from benchmarks.tuning import cells
from benchmarks.work import KERNELS, Work, kernel_work, layer_work, operator_work
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.rethinking.policy import fold_break_even
from tests.benchmarks.made_up import CPU, LIMITS, document, gru_kernel, row

LLAMA_8B = Sizes(4096, 14336, 409, rounds=3, tokens=8192, dtype="bf16")


def test_a_result_stands_beside_its_prediction():
    """Kernels and layers of the sizes that are predicted; those of a CPU, of other experts or names are none."""
    kernel = gru_kernel("later", 1e-4)
    others = [gru_kernel("later", 1.0, experts=64), gru_kernel("later", 1.0, kernel="nonesuch")]
    rows = [row("triton", 6e-3), row("dense", 4e-3, rounds=1), row("triton", 1.0, model="qwen3-4b")]
    _, lines = beside(document(rows, kernels=[kernel, *others]))
    assert [line[0] for line in lines] == ["gru_forward, later round, 8,192 tokens", rows[0]["case"]]
    assert lines[0][1:] == ["46.5 us", "L2", "100 us", f"{100 / 46.5:.2f}"]  # as the page has them
    assert lines[1][-1] == f"{6000 / 6574.7:.2f}"
    assert beside(document(rows, CPU, kernels=[kernel]))[1] == []


def test_every_line_that_the_page_has_is_read():
    """One that is written otherwise would be left out in silence."""
    names = {"routing_backward", *(name for name in KERNELS if not name.startswith("experts_stream"))}
    names |= {"routing_order", "experts_backward_tokens", "experts_backward_weights"}  # that there are no more
    assert {key[0] for key in predicted() if isinstance(key[0], str)} == names
    assert {(8192, 3), (8192, 1), (16, 3), (1, 3)} <= predicted().keys()


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
    assert kernel_work([launched("routing_backward", x)], sizes, False) == Work(4 * 64, 0.0)


def test_every_kernel_with_products_is_known():
    """By the names of the configurations: one that is missed would be shown as if it computed nothing."""
    names = {cell.kernel.removesuffix("_wide_rank").removesuffix("_unaligned") for cell in cells()}
    assert names - {"routing_backward"} == set(KERNELS)


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
