"""The cost model: its figures at a known size, its agreement with what the code executes, its errors, its command."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphmoe_kernels import (
    ExpertOperands,
    FoldSettings,
    GateUp,
    build_fold,
    expert_swiglu,
    gru_step,
    topk_softmax_routing,
)
from graphmoe_kernels.cost import (
    COUNTS,
    FORMS,
    Sizes,
    count_flops,
    count_layer,
    fold_build,
    fold_bytes,
    further_round,
    layer_terms,
    multiply_adds,
    round_terms,
    traffic,
)
from graphmoe_kernels.cost.__main__ import main
from graphmoe_kernels.testing import make_layer

LLAMA_8B = Sizes(hidden=4096, intermediate=14336, gru_width=409, tokens=8192)
SMALL = Sizes(hidden=64, intermediate=176, gru_width=6, experts=8, top_k=2, rank=4, tokens=33, dtype="fp32")


def mega(value: float) -> int:
    return round(value / 1e6)


@pytest.mark.parametrize(
    "form, one, three, further",
    # peers: 4 D F a round and its low-rank terms; literal: 3 D F. Joining two rounds: 4 D G + 3 G^2. A folded round:
    # 5 F G + 3 G^2 + 3 k r F.
    [("dense", 176, 176, 0), ("peers", 237, 724, 244), ("literal", 178, 548, 185), ("folded", 178, 240, 31)],
)
def test_multiply_adds_of_an_8b_layer(form, one, three, further):
    """The figures that the speed targets stand on: a changed term shows here."""
    found = multiply_adds(form, replace(LLAMA_8B, rounds=1)), multiply_adds(form, LLAMA_8B)
    assert (*map(mega, found), mega(further_round(form, LLAMA_8B))) == (one, three, further)


METHODS = {
    "LoRA (with rounds)": {"routers": "none", "experts": 1, "top_k": 1, "rank": 80},
    "MixLoRA": {},
    "LoRAMoE": {"routers": "linear", "experts": 6, "top_k": 6, "rank": 24},
    "MoLA": {"routers": "linear", "rank": 10},
}
METHODS |= {
    name: {**METHODS[plain], "dora": True}
    for name, plain in zip(("DoRA (with rounds)", "MixDoRA", "DoRAMoE", "MoDA"), METHODS, strict=True)
}


@pytest.mark.methods
@pytest.mark.parametrize("method", METHODS)
def test_the_documented_cost_of_every_method(method):
    """The table of methods and folds in docs/folding.md: its figures are this model's."""
    page = (Path(__file__).parents[2] / "docs" / "folding.md").read_text()
    (row,) = re.findall(rf"^\| {re.escape(method)} \|.*", page, re.MULTILINE)
    found = re.search(r"(\d+) M literal, (\d+) M folded \| ([\d.]+) \|$", row)
    sizes = replace(LLAMA_8B, **METHODS[method])
    literal, folded = (multiply_adds(form, sizes) for form in ("literal", "folded"))
    assert found.groups() == (str(mega(literal)), str(mega(folded)), f"{folded / literal:.2f}")


@pytest.mark.parametrize("form, read", [("dense", 352), ("literal", 1096), ("folded", 480)])
def test_bytes_of_one_token_are_the_weights_it_needs(form, read):
    """Decoding is bound by weights: three base matrices once (dense, folded) or once a round, in bf16."""
    assert mega(traffic(form, replace(LLAMA_8B, tokens=1)).read) == read


@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_what_is_executed_for_nothing(rounds):
    """Zeros are counted: the folded form executes what it needs at its padded width, and then half of [h | H]'s matrix.

    n = k and G = 16, so that nothing else differs. The last step's recurrent gates are computed and not needed.
    """
    sizes = Sizes(hidden=64, intermediate=176, gru_width=16, experts=4, top_k=4, rank=4, rounds=rounds)
    zeros = (rounds - 1) * (2 * 4 * 4 + 2 * 16) * 16
    gates = 2 * 16 * 16
    assert multiply_adds("folded", sizes, "executed") - multiply_adds("folded", sizes) == zeros + gates


def test_building_and_keeping_the_fold_of_an_8b_layer():
    """5 F D G multiply-adds and 5 F G elements for M and Q, about a hundredth more for the rest."""
    kept = fold_bytes(LLAMA_8B)
    assert kept["M"] + kept["Q"] == 5 * 14336 * 409 * 2
    assert fold_bytes(LLAMA_8B, "executed")["experts"] == 3 * 8 * 16 * (4096 + 14336) * 2, (
        "A and B of three projections"
    )
    assert sum(fold_build(LLAMA_8B).values()) / (5 * 14336 * 4096 * 409) == pytest.approx(1.01, abs=0.005)


@pytest.mark.parametrize(
    "sizes",
    [
        replace(SMALL, rounds=1),
        replace(SMALL, rounds=3),
        replace(SMALL, rounds=5, tokens=1),
        replace(SMALL, top_k=8),
        replace(SMALL, experts=1, top_k=1),
        replace(SMALL, experts=7, top_k=3, rank=5, gru_width=16, intermediate=97),
        *(replace(SMALL, dora=True, rounds=rounds) for rounds in (1, 3)),
        *(replace(SMALL, routers="linear", dora=dora, rounds=rounds) for dora in (False, True) for rounds in (1, 3)),
        replace(SMALL, routers="linear", top_k=8),
        *(replace(SMALL, routers="none", experts=1, top_k=1, dora=dora) for dora in (False, True)),
    ],
    ids=[
        *("T=1", "T=3", "T=5, one token", "k=n", "n=1", "odd sizes", "MixDoRA, T=1", "MixDoRA", "MoLA, T=1", "MoLA"),
        *("MoDA, T=1", "MoDA", "LoRAMoE", "LoRA", "DoRA"),
    ],
)
def test_executed_arithmetic_is_what_the_code_executes(sizes):
    """The model describes this code, not an idea of it: PyTorch's FLOP counter decides, to the last one."""
    readings = count_layer(sizes)
    assert [r.code for r in readings] == ["rethink_literal", "rethink_folded", "build_fold"]
    for reading in readings:
        assert reading.modelled == reading.counted, reading


def test_the_counter_sees_into_the_expert_operator():
    """An opaque operator would read as zero FLOP, and any model of it would pass."""
    layer = make_layer(8, 48, 4, 2, None, dtype=torch.float32)
    e = layer.experts.lora
    tokens, k = 5, 2
    gate, up = torch.randn(2, tokens, 48).unbind()
    low = torch.randn(tokens, 16, requires_grad=True)
    experts = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 0]])

    def run():
        operands = ExpertOperands(
            GateUp(gate, up), low, GateUp(e.gate_B, e.up_B), e.down_A, torch.full((tokens, k), 0.5), experts
        )
        return expert_swiglu(operands, scale=2.0)

    forward = count_flops(run)
    assert forward == 3 * 2 * tokens * k * 48 * 2  # B of gate and up and A of down, on chosen experts
    both = count_flops(lambda: sum(t.sum() for t in run()).backward())
    assert both - forward >= 2 * forward  # every product of the forward has two in the backward


@pytest.mark.kernels
@pytest.mark.parametrize("part", ["routing", "experts", "GRU step"])
def test_the_counter_refuses_what_it_cannot_see(part):
    """The products of a Triton kernel would read as zero FLOP, and a layer on Triton as nearly free."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    e = make_layer(16, 48, 4, 2, None, dtype=torch.float32, device=device).experts.lora
    wide, low, weights = (torch.randn(5, size, device=device) for size in (48, 16, 2))
    experts = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 0]], device=device)

    def run():
        if part == "routing":
            topk_softmax_routing(low, 2, backend="triton")
        elif part == "experts":
            operands = ExpertOperands(GateUp(wide, wide), low, GateUp(e.gate_B, e.up_B), e.down_A, weights, experts)
            expert_swiglu(operands, scale=2.0, backend="triton")
        else:
            gru_step(wide, None, None, None, torch.zeros(16, 16, device=device), low[0], backend="triton")

    with pytest.raises(ValueError, match="Triton kernels hide theirs: run with backend='torch'"):
        count_flops(run)


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("routers", ["layer", "linear"])
def test_kept_bytes_are_the_folds_own(routers, dora):
    """What the model says a kept fold takes is what a fold's tensors take; in one round, the experts alone."""
    for width in (6, None):
        layer = make_layer(64, 176, 8, 4, width, routers=routers, dora=dora, dtype=torch.float32)
        fold = build_fold(layer, FoldSettings(torch.float32, 2.0, "expert_output"), copy=True)
        found = sum(t.untyped_storage().nbytes() for t in fold.tensors())
        modelled = fold_bytes(replace(SMALL, routers=routers, dora=dora), "executed")
        assert found == (sum(modelled.values()) if width else modelled["experts"])


@pytest.mark.parametrize("count", COUNTS)
def test_cost_in_rounds_and_experts(count):
    """Linear in T from the second round on; folded below literal below peers; flat in n but for the router."""
    for form in ("peers", "literal", "folded"):
        per_round = [multiply_adds(form, replace(LLAMA_8B, rounds=t), count) for t in (2, 3, 4, 9)]
        further = further_round(form, LLAMA_8B, count)
        assert per_round == [per_round[0] + i * further for i in (0, 1, 2, 7)]
    costs = [multiply_adds(form, LLAMA_8B, count) for form in ("folded", "literal", "peers")]
    assert costs == sorted(costs)
    if count == "needed":
        more = multiply_adds("literal", replace(LLAMA_8B, experts=64)) - multiply_adds("literal", LLAMA_8B)
        assert more == LLAMA_8B.rounds * (64 - 8) * LLAMA_8B.hidden


def test_terms_of_all_rounds_are_the_sum():
    """A table by term must add up to the totals printed beside it."""
    for form in FORMS:
        rounds = [term for t in (1, 2, 3) for term in round_terms(form, LLAMA_8B, t)]
        assert sum(t.multiply_adds for t in layer_terms(form, LLAMA_8B)) == sum(t.multiply_adds for t in rounds)
        assert sum(t.weights for t in layer_terms(form, LLAMA_8B)) == sum(t.weights for t in rounds)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": -4096}, ValueError, "hidden must be at least 1, got -4096"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
        ({"rank": 1.5}, TypeError, "rank must be an integer, got 1.5"),
        ({"top_k": 9}, ValueError, r"top_k must lie in 1..8 \(the number of experts\), got 9"),
        ({"routers": "mlp"}, ValueError, "unknown routers 'mlp'; expected one of 'layer', 'linear', 'none'"),
        ({"routers": "none"}, ValueError, "8 experts need a router; without one there can be one expert"),
        ({"dtype": "int8"}, ValueError, "unknown dtype 'int8'; expected one of 'bf16', 'fp16', 'fp32', 'fp64'"),
    ],
)
def test_wrong_sizes_are_named(change, error, message):
    """A cost of sizes that no layer has would be a silent nonsense."""
    with pytest.raises(error, match=message):
        replace(LLAMA_8B, **change)


def test_wrong_forms_counts_and_rounds_are_named():
    """A misspelt form must not cost nothing."""
    with pytest.raises(ValueError, match="unknown form 'fold'; expected one of 'dense', 'peers', 'literal', 'folded'"):
        multiply_adds("fold", LLAMA_8B)
    with pytest.raises(ValueError, match="unknown count 'real'; expected one of 'needed', 'executed'"):
        multiply_adds("folded", LLAMA_8B, "real")
    with pytest.raises(ValueError, match=r"round must lie in 1..3, got 4"):
        round_terms("literal", LLAMA_8B, 4)


def test_command_prints_figures_and_the_counters_reading(capsys):
    """The command is how people get the figures; its last table says whether the model holds."""
    main(["--hidden", "4096", "--intermediate", "14336", "--tokens", "8192", "--rounds", "3", "--terms"])
    printed = capsys.readouterr().out
    for figure in ("724.0", "547.8", "240.0", "243.8", "58.6 MB", "79.7 MB", "399 tokens", "fold update H M^T"):
        assert figure in printed
    deviations = re.findall(r"^ +(?:rethink_\w+|build_fold) .* ([\d.]+)%$", printed, re.MULTILINE)
    assert len(deviations) == 3
    assert set(deviations) == {"0.00"}, "as the documentation says"


def test_command_for_one_round_says_what_is_kept(capsys):
    """Plain MixLoRA has no fold, but inference keeps its experts in the compute dtype: memory that must be told of."""
    main(["--hidden", "4096", "--intermediate", "14336", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "Kept in inference: the experts in the compute dtype, 14.2 MB" in printed
    assert "building it" not in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hidden", "-1", "--intermediate", "64"], "hidden must be at least 1"),
        (["--hidden", "64", "--intermediate", "64", "--top-k", "9"], "top_k must lie in 1..8"),
        (["--hidden", "64", "--intermediate", "64", "--dtype", "int4"], "invalid choice"),
        (["--hidden", "64", "--intermediate", "64", "--gru-scale", "2"], r"gru-scale must lie in \(0, 1\]"),
        (["--hidden", "5", "--intermediate", "64"], "a GRU of width 0"),
    ],
)
def test_command_refuses_wrong_arguments(arguments, message, capsys):
    """A wrong argument ends with a sentence, not with a traceback."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
