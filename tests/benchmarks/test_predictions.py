"""What is known before a measurement: the page of predictions, and the work of kernels and layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.limits import H200
from benchmarks.predictions import beside, predicted
from benchmarks.work import KERNELS, experts_per_tile, kernel_work, layer_work
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.rethinking.policy import fold_break_even
from tests.benchmarks.made_up import CPU, document, gru_kernel, row

LLAMA_8B = Sizes(4096, 14336, 409, rounds=3, dtype="bf16")


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


def test_every_kernel_that_the_page_has_is_read():
    """A line that is written otherwise would be left out in silence."""
    assert {key[0] for key in predicted() if isinstance(key[0], str)} == set(KERNELS)
    assert {(8192, 3), (8192, 1), (16, 3), (1, 3)} <= predicted().keys()


def test_an_order_leaves_few_experts_to_a_tile():
    """As they come, 64 tokens hold all eight experts in each slot; in order, two and at borders a few more."""
    assert experts_per_tile(8192, 8, 2, 64, ordered=False) == pytest.approx(8, abs=0.1)
    assert 2 <= experts_per_tile(8192, 8, 2, 64, ordered=True) < 3
    assert experts_per_tile(1, 8, 2, 16, ordered=False) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_tokens_are_more_work_and_more_time(kernel):
    few, many = (kernel_work(kernel, replace(LLAMA_8B, tokens=tokens), later=False) for tokens in (2048, 8192))
    assert many.bytes > few.bytes
    assert many.l2_bytes > few.l2_bytes
    assert max(H200.times(many).values()) > max(H200.times(few).values())


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="unknown kernel 'nonesuch'; expected one of"):
        kernel_work("nonesuch", LLAMA_8B, later=False)


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
