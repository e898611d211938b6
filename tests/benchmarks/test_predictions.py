"""The predictions' arithmetic, and that they stand beside what was measured and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import predictions as p
from benchmarks.limits import H200
from benchmarks.work import KERNELS, experts_per_tile, kernel_work, layer_work
from graphmoe_kernels.rethinking.policy import fold_break_even
from tests.benchmarks.made_up import CPU, document, gru_kernel, row


def test_a_result_stands_beside_its_prediction():
    """Kernels and layers of the sizes that are predicted; those of a CPU, of other experts or names are none."""
    kernel = gru_kernel("later", 1e-4)
    others = [gru_kernel("later", 1.0, experts=64), gru_kernel("later", 1.0, kernel="nonesuch")]
    rows = [row("triton", 6e-3), row("dense", 4e-3, rounds=1), row("triton", 1.0, model="qwen3-4b")]
    _, lines = p.beside(document(rows, kernels=[kernel, *others]))
    assert [line[0] for line in lines] == ["gru_forward, later round, 8,192 tokens", rows[0]["case"]]
    predicted = p.predict("gru_forward", p.sizes_at(8192), True)[0]
    assert lines[0][-1] == f"{1e-4 / predicted:.2f}"
    assert lines[1][-1] == f"{6e-3 / p.total(p.layer_parts(p.sizes_at(8192))):.2f}"
    assert p.beside(document(rows, CPU, kernels=[kernel]))[1] == []


def test_limits_are_floors_of_the_dense_layer():
    """8192 tokens through the dense MLP: 3.65 ms of products at 790 TFLOP/s, by hand."""
    parts = p.dense_parts(p.sizes_at(8192))
    products = p.total({name: parts[name] for name in ("gate, up", "down")})
    assert products == pytest.approx(3 * 2 * 8192 * 4096 * 14336 / 790e12, rel=2e-3)


def test_an_order_leaves_few_experts_to_a_tile():
    """As they come, 64 tokens hold all eight experts in each slot; in order, two and at borders a few more."""
    assert experts_per_tile(8192, 8, 2, 64, ordered=False) == pytest.approx(8, abs=0.1)
    assert 2 <= experts_per_tile(8192, 8, 2, 64, ordered=True) < 3
    assert experts_per_tile(1, 8, 2, 16, ordered=False) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_tokens_are_more_work_and_more_time(kernel):
    few, many = (kernel_work(kernel, replace(p.LLAMA_8B, tokens=tokens), later=False) for tokens in (2048, 8192))
    assert many.bytes > few.bytes
    assert many.l2_bytes > few.l2_bytes
    assert max(H200.times(many).values()) > max(H200.times(few).values())


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="unknown kernel 'nonesuch'; expected one of"):
        kernel_work("nonesuch", p.LLAMA_8B, later=False)


def test_every_kernel_and_forward_is_among_the_printed_predictions():
    text = "\n".join(p.tables())
    assert all(f"| {kernel}, first round | 8192 |" in text for kernel in KERNELS)
    assert "| 8192 tokens, T=3 |" in text


def test_the_break_even_is_that_of_the_layers_kind():
    """With DoRA a fold saves less, so a training step of the tokens in between is a literal one."""
    sizes = replace(p.LLAMA_8B, dora=True)
    widths = (sizes.hidden, sizes.intermediate, 416, sizes.rounds)
    plain, dora = fold_break_even(*widths), fold_break_even(*widths, dora=True)
    assert plain != dora
    between = replace(sizes, tokens=int((plain + dora) / 2))
    assert layer_work("folded", between, True) == layer_work("literal" if plain < dora else "folded", between, True)
    beyond = replace(sizes, tokens=int(max(plain, dora)) + 1)
    assert layer_work("folded", beyond, True) != layer_work("literal", beyond, True)
