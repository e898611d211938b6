"""The targets: each at its bound, from the right file, and never guessed."""

from __future__ import annotations

import pytest

from benchmarks.targets import ELSEWHERE, MISSING, TARGETS, target_rows
from tests.benchmarks.made_up import CPU, H200, document, gru_kernel, in_turns, row, source

DECODER = {"group": "decoder", "mode": "prefill"}
DECODE = {"group": "decoder", "mode": "decode", "graph": True, "context": 2048, "tokens": 1}
ROUTING = {"group": "routing", "round": "first", "graph": True}
ON_CPU = {"dtype": "fp32", "tokens": 256, "model": "llama-3.2-1b"}


def layer(over, under, ratio, rounds=(3, 3), **changes):
    """Two rows of one case, the first ``ratio`` times as long as the second."""
    return in_turns(row(over, 1e-3 * ratio, rounds=rounds[0], **changes), row(under, 1e-3, rounds=rounds[1], **changes))


def memory(ratio):
    rows = layer("triton", "literal_compiled", 1.0, mode="training")
    rows[0]["peak bytes"], rows[1]["peak bytes"] = 1e9 * ratio, 1e9
    return {"rows": rows}


def gru(share):
    kernels = [gru_kernel("first", 0.4e-3 * share), gru_kernel("later", 0.6e-3 * share)]
    return {"rows": [row("triton", 1e-3)], "kernels": kernels}


# Of every target: its bound, its worse side (+1 above, -1 below), and a result in which the figure is what is asked.
CASES = {
    "prefill, 8192 tokens, T=3, over": (1.6, 1, lambda x: {"rows": layer("triton", "dense", x, (3, 1))}),
    "same, times faster than the compiled": (2.0, -1, lambda x: {"rows": layer("literal_compiled", "triton", x)}),
    "same, times faster than a peer's": (6.0, -1, lambda x: {"rows": layer("peer_mixlora", "triton", x)}),
    "decode, 1 token": (1.7, 1, lambda x: {"rows": layer("triton", "dense", x, (3, 1), tokens=1, graph=True)}),
    "decode, 16 tokens": (1.7, 1, lambda x: {"rows": layer("triton", "dense", x, (3, 1), tokens=16, graph=True)}),
    "each further round, share of a decoder layer at T=1, prefill": (
        *(0.16, 1),
        lambda x: {"rows": layer("triton", "triton", 1 + 2 * x, (3, 1), **DECODER)},
    ),
    "each further round, share of a decoder layer at T=1, decode": (
        *(0.16, 1),
        lambda x: {"rows": layer("triton", "triton", 1 + 2 * x, (3, 1), **DECODE)},
    ),
    "training step": (1.7, -1, lambda x: {"rows": layer("literal_compiled", "triton", x, mode="training")}),
    "same, peak memory": (0.4, 1, memory),
    "share of the GRU": (0.03, 1, gru),
    "MixLoRA (T=1)": (1.15, 1, lambda x: {"rows": layer("triton", "dense", x, (1, 1))}),
    "routing, 1 token": (4.0, -1, lambda x: {"rows": layer("torch", "triton", x, (1, 1), tokens=1, **ROUTING)}),
    "routing, 16,384": (4.0, -1, lambda x: {"rows": layer("torch", "triton", x, (1, 1), tokens=16384, **ROUTING)}),
    "CPU, fp32, 64 tokens": (1.7, -1, lambda x: {"rows": layer("literal", "torch", x, **ON_CPU), "device": CPU}),
    "same, T=1, over the literal": (
        *(1.05, 1),
        lambda x: {"rows": layer("torch", "literal", x, (1, 1), **ON_CPU), "device": CPU},
    ),
}


def found(what, *contents):
    rows = [each for each in target_rows([source(content) for content in contents]) if each.what.startswith(what)]
    assert len(rows) == 1
    return rows[0]


def test_without_results_every_target_is_there_and_none_is_measured():
    """A table that leaves out what was not measured hides it."""
    rows = target_rows([])
    assert len(rows) == len(TARGETS) == len(CASES)
    assert {(each.found, each.verdict, each.conditions) for each in rows} == {("-", MISSING, "-")}
    assert all(sum(each.what.startswith(what) for what in CASES) == 1 for each in rows)


@pytest.mark.parametrize("what", CASES)
def test_every_target_is_met_at_its_bound_and_missed_beyond(what):
    """The bound, its direction and the rows that it is read from."""
    bound, worse, result = CASES[what]
    assert found(what, document(**result(bound))).verdict == "met"
    assert found(what, document(**result(bound * (1 - 0.01 * worse)))).verdict == "met"
    missed = found(what, document(**result(bound * (1 + 0.01 * worse))))
    assert missed.verdict == "missed"
    assert missed.found.startswith(f"{bound * (1 + 0.01 * worse):.3f}")
    others = [each for each in target_rows([source(document(**result(bound)))]) if not each.what.startswith(what)]
    assert sum(each.verdict == MISSING for each in others) >= len(TARGETS) - 2  # memory comes with the training times


WRONG = {
    "another dtype": {"dtype": "fp16"},
    "another model": {"model": "qwen3-4b"},
    "fewer tokens": {"tokens": 4096},
    "another group": {"group": "rounds"},
    "another mode": {"mode": "training"},
    "in a graph": {"graph": True},
    "another T": {"rounds": (2, 1)},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_rows_of_other_cases_answer_nothing(changes):
    """A ratio of another case is not the target's, however good."""
    rows = layer("triton", "dense", 1.1, **{"rounds": (3, 1), **changes})
    assert found("prefill, 8192 tokens, T=3", document(rows)).verdict == MISSING


def test_other_adapters_answer_nothing():
    """n, k and rank are the paper's: an adapter of rank 64 has its own cost."""
    rows = layer("triton", "dense", 1.1, (3, 1))
    for each in rows:
        each["sizes"]["rank"] = 64
    assert found("prefill, 8192 tokens, T=3", document(rows)).verdict == MISSING


def test_gpu_figures_never_come_from_a_cpu_nor_the_other_way_round():
    """The interpreter's times on a CPU have the GPU rows' names."""
    of_gpus = [made for bound, _, result in CASES.values() if "device" not in (made := result(bound))]
    assert len(of_gpus) == len(TARGETS) - 2
    on_cpu = [source(document(**each, device=CPU)) for each in of_gpus]
    assert {each.verdict for each in target_rows(on_cpu)} == {MISSING}
    of_cpu = CASES["CPU, fp32, 64 tokens"][2](2.0)
    assert found("CPU", document(of_cpu["rows"], H200)).verdict == MISSING


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB", "NVIDIA H200 MIG 1g.18gb"])
def test_another_gpu_is_named_and_meets_nothing(name):
    """The targets are about a whole H200."""
    other = document(layer("triton", "dense", 1.1, (3, 1)), {**H200, "name": name})
    row_of_other = found("prefill, 8192 tokens, T=3", other)
    assert row_of_other.verdict == ELSEWHERE
    assert row_of_other.found.startswith("1.100")
    assert row_of_other.conditions.startswith(f"{name}, 0123456789, 2026-11-30")


def test_the_h200_goes_before_another_gpu_and_the_newer_before_the_older():
    """What the table shows is the best evidence among the files."""
    names = {"new": "2026-12-02", "old": "2026-12-01"}
    contents = [document(layer("triton", "dense", ratio, (3, 1))) for ratio in (1.1, 1.2)]
    for content, date in zip(contents, names.values(), strict=True):
        content["conditions"]["date"] = f"{date}T00:00:00+00:00"
    other = document(layer("triton", "dense", 1.3, (3, 1)), {**H200, "name": "NVIDIA H100"})
    other["conditions"]["date"] = "2027-01-01T00:00:00+00:00"
    shown = found("prefill, 8192 tokens, T=3", other, contents[1], contents[0])
    assert shown.found.startswith("1.100")
    assert shown.conditions.endswith("2026-12-02")


def test_the_ratio_turn_by_turn_goes_before_that_of_medians_which_says_so():
    """A disturbance between two steps must not pass for a ratio."""
    together = layer("triton", "dense", 1.5, (3, 1))
    together[0]["ratios"] = {"dense, T=1": {"median": 1.4, "range": [1.3, 1.45]}}
    lone = row("dense", 1e-6, rounds=1, case="another case")
    assert found("prefill, 8192 tokens, T=3", document([*together, lone])).found == "1.400 [1.300, 1.450]"
    apart = [row("triton", 1.5e-3), lone | {"seconds": together[1]["seconds"]}]
    assert found("prefill, 8192 tokens, T=3", document(apart)).found == "1.500 (of medians)"


def test_on_a_cpu_the_worst_token_count_from_64_on_counts_and_tiny_never():
    """One good case must not stand for all; tiny sizes say nothing."""
    rows = [
        *layer("literal", "torch", 2.5, **ON_CPU),
        *layer("literal", "torch", 1.9, **{**ON_CPU, "tokens": 64}),
        *layer("literal", "torch", 1.1, **{**ON_CPU, "tokens": 63}),
        *layer("literal", "torch", 1.0, **{**ON_CPU, "model": "tiny", "tokens": 128}),
    ]
    row_of_cpu = found("CPU", document(rows, CPU))
    assert row_of_cpu.verdict == "met"
    assert row_of_cpu.found == "1.900 [1.881, 1.919], the worst of 2: llama-3.2-1b, 64 tokens"


@pytest.mark.parametrize("peaks", [(None, 1e9), (1e9, None), (1e9, 0)])
def test_memory_that_was_not_read_is_not_measured(peaks):
    """On a CPU there is no peak, and zero is no measure to divide by."""
    content = document(**memory(0.3))
    content["rows"][0]["peak bytes"], content["rows"][1]["peak bytes"] = peaks
    assert found("same, peak memory", content).verdict == MISSING


def test_half_of_the_gru_is_no_share_of_it():
    """A step of the GRU that was not timed must not count as free."""
    content = document(**gru(0.02))
    content["kernels"].pop()
    assert found("share of the GRU", content).verdict == MISSING
