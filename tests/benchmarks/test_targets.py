"""The targets: each at its bound, from the right file, and never guessed."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from benchmarks.sizes import MODELS
from benchmarks.table import PLANS, table
from benchmarks.targets import MISSING, TARGETS, further, gru_share, peaks, target_rows
from tests.benchmarks.made_up import CPU, H200, document, gru_kernel, in_turns, row, source

# The design's, in its order.
WANTED = ["<= 1.6", ">= 2.0", ">= 6.0", "<= 1.7", "<= 1.7", "<= 0.16", "<= 0.16", ">= 1.7", "<= 0.4", "<= 0.03"]
WANTED += ["<= 1.15", ">= 4.0", ">= 4.0", ">= 1.7", "<= 1.05"]
# A CPU's training steps of two models, and its inference.
WANTED += [
    "<= 1.8",
    "<= 4.2",
    "<= 1.9",
    ">= 1.5",
    "<= 1.8",
    ">= 1.6",
    "<= 1.5",
    "<= 1.6",
    "<= 1.05",
    "<= 1.1",
    "<= 1.25",
]
PREFILL, GRU = TARGETS[0], TARGETS[9]
FOLDED = next(target for target in TARGETS if target.device == "cpu")


def measured(target, figure, device=None, **changes):
    """A result in which a target's figure is what is asked."""
    case = target.case.replace("*", "llama-3.2-1b", 1).replace("*", "256")
    ratio = {further: 1 + 2 * figure, peaks: 1.0, gru_share: 1.0}.get(target.figure, figure)
    tokens = 1 if " 1 tokens" in case else 1024 if target.device == "cpu" else 8192
    rows = [row("x", 1e-3 * ratio, label=target.over, tokens=tokens)]
    rows += [row("y", 1e-3, label=target.under)] if target.under != target.over else []
    for each, held in zip(rows, (1e9 * figure, 1e9), strict=False):
        each |= {"case": case, "peak bytes": held if target.figure is peaks else None, **changes}
    steps = [("first", 0.4), ("later", 0.6)] if target.figure is gru_share else []
    kernels = [gru_kernel(name, 1e-3 * figure * share) for name, share in steps]
    return document(in_turns(*rows), device or (CPU if target.device == "cpu" else H200), kernels=kernels)


def found(target, *contents):
    """A target's row of the table: wanted, found, verdict, measured on."""
    return target_rows([source(content) for content in contents])[TARGETS.index(target)][1:]


def test_without_results_every_target_is_there_and_none_is_measured():
    """A table that leaves out what was not measured hides it."""
    assert [each[1:] for each in target_rows([])] == [[wanted, "-", MISSING, "-"] for wanted in WANTED]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.what)
def test_every_target_is_met_at_its_bound_and_missed_beyond(target):
    """The bound and its direction; and that nothing else is read from that case."""
    sign, bound = target.wanted.split()
    worse = 1.01 if sign == "<=" else 0.99
    for figure, verdict in ((1.0, "met"), (2 - worse, "met"), (worse, "missed")):
        _, shown, said, _ = found(target, measured(target, float(bound) * figure))
        assert said == verdict
        assert shown.startswith(f"{float(bound) * figure:.3f}")
    others = [row[3] for row in target_rows([source(measured(target, 1.0))]) if row[0] != target.what]
    assert others.count(MISSING) >= len(TARGETS) - 2  # memory comes with the training times


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.what)
def test_what_a_target_is_about_is_measured(target):
    """A name that no case has would leave the target unmeasured for ever. Sizes of the adapter are the paper's."""
    models, dtype = (("llama-3-8b",), "bf16") if target.device == "cuda" else (("llama-3.2-1b", "smollm2-135m"), "fp32")
    known = (c for m in models for c in table(MODELS[m], target.device, dtype, PLANS[target.device]))
    cases = [case for case in known if fnmatchcase(case.name, target.case)]
    cases = [case for case in cases if case.sizes.tokens >= target.tokens]
    assert cases
    for case in cases:
        assert {target.over, target.under} <= {contender.label for contender in case.contenders}
        rank = 8 if case.group == "step" else 16
        assert (case.sizes.experts, case.sizes.top_k, case.sizes.rank) == (8, 2, rank)
        assert target.device == "cpu" or "graph" not in target.what or case.graph


def test_gpu_figures_never_come_from_a_cpu_nor_the_other_way_round():
    """The interpreter's times on a CPU have the GPU rows' names."""
    for target in TARGETS:
        assert found(target, measured(target, 1.0, H200 if target.device == "cpu" else CPU))[2] == MISSING


def test_a_case_that_is_otherwise_alike_answers_nothing():
    """A ratio of another case is not the target's, however good."""
    others = ("prefill", "4096 tokens", "T=2", "n=64", "fp16", "qwen3-4b")
    names = [
        PREFILL.case.replace(own, other)
        for own, other in zip(("inference", "8192 tokens", "T=3", "n=8", "bf16", "llama-3-8b"), others, strict=True)
    ]
    for name in (*names, f"{PREFILL.case}, eager"):
        assert found(PREFILL, measured(PREFILL._replace(case=name), 1.1))[2] == MISSING


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB", "NVIDIA H200 MIG 1g.18gb"])
def test_another_gpu_is_named_and_meets_nothing(name):
    """The targets are about a whole H200."""
    _, shown, said, where = found(PREFILL, measured(PREFILL, 1.1, {**H200, "name": name}))
    own = name.removeprefix("NVIDIA ")
    assert (said, shown[:5]) == (f"not measured on an H200 (kept on {own})", "1.100")
    far_off = found(PREFILL, measured(PREFILL, 4.3, {**H200, "name": name}))
    assert far_off[2] == f"missed (on {own})", "4.3 for 1.6 that is called not measured reads like a pass"
    assert where == f"{name}, torch 2.13.0, triton 3.7.1, commit 0123456789, 2026-11-30"


def test_the_h200_goes_before_another_gpu_and_the_newer_before_the_older():
    """What the table shows is the best evidence among the files."""
    contents = [measured(PREFILL, 1.1), measured(PREFILL, 1.2), measured(PREFILL, 1.3, {**H200, "name": "NVIDIA H100"})]
    for content, date in zip(contents, ("2026-12-02", "2026-12-01", "2027-01-01"), strict=True):
        content["conditions"]["date"] = f"{date}T00:00:00+00:00"
    _, shown, _, where = found(PREFILL, *reversed(contents))
    assert shown.startswith("1.100")
    assert where.endswith("2026-12-02")


def test_only_a_ratio_turn_by_turn_counts():
    """A disturbance between two cases must not pass for a ratio."""
    content = measured(PREFILL, 1.5)
    content["rows"][0]["ratios"] = {"dense": {"median": 1.4, "range": [1.3, 1.45]}}
    assert found(PREFILL, content)[1] == "1.400 [1.300, 1.450]"
    content["rows"][1]["case"] = "another"
    assert found(PREFILL, content)[2] == MISSING


def test_on_a_cpu_the_worst_token_count_from_64_on_counts_and_tiny_never():
    """One good case must not stand for all; tiny sizes say nothing."""
    made = [(2.5, 256, "llama-3.2-1b"), (1.9, 64, "llama-3.2-1b"), (1.1, 63, "llama-3.2-1b"), (1.0, 128, "tiny")]
    rows = []
    for ratio, tokens, model in made:
        target = FOLDED._replace(case=f"layer, {model}, inference, {tokens} tokens, T=3, n=8, fp32")
        rows += measured(target, ratio, model=model, sizes={**row("x", 1)["sizes"], "tokens": tokens})["rows"]
    _, shown, said, _ = found(FOLDED, document(rows, CPU))
    assert (said, shown) == ("met", "1.900 [1.881, 1.919], the worst of 2: llama-3.2-1b, 64 tokens")


@pytest.mark.parametrize("held", [(None, 1e9), (1e9, None), (1e9, 0)])
def test_memory_that_was_not_read_is_not_measured(held):
    """On a CPU there is no peak, and zero is no measure to divide by."""
    target = next(target for target in TARGETS if target.figure is peaks)
    content = measured(target, 0.3)
    for each, peak in zip(content["rows"], held, strict=True):
        each["peak bytes"] = peak
    assert found(target, content)[2] == MISSING


def test_half_of_the_gru_is_no_share_of_it():
    """A step of the GRU that was not timed must not count as free."""
    content = measured(GRU, 0.02)
    content["kernels"].pop()
    assert found(GRU, content)[2] == MISSING
