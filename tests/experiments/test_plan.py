"""The order of a study's runs, the rates that validation chooses, and how long a run is expected to take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("lm_eval")

from experiments.study.plan import Undecided, chosen_rate, run_of, seconds_of, slots
from experiments.study.results import Results, runs_of
from experiments.study.settings import Part, Rate, Run
from tests.experiments.made_up import PLAIN, document, part, small


def test_the_order_completes_comparisons_early():
    """All methods at the first rates, then at the others, then with the next seed; tasks take turns."""
    order = slots(part())
    key = [(slot.seed, slot.task, slot.method.name, None if slot.rate is None else slot.rate.name) for slot in order]
    first = [
        (3, task, name, rate)
        for task in ("one", "three")
        for name, rate in (("untouched", None), ("mixlora", "lr0.01"), ("graphmoe", "lr0.01-gru0.1"))
    ]
    assert key[:6] == first
    assert {each[3] for each in key[6:10]} == {"lr0.02", "lr0.01-gru0.3"}
    assert key[10:] == [(4, task, name, None) for task in ("one", "three") for name in ("mixlora", "graphmoe")]


def filled(folder: Path, own: Part, **validation: str) -> Results:
    """Results of the first seed, with validation marks by ``method_rate``."""
    results = Results(own, folder)
    for run in runs_of(own):
        if run.seed == own.seeds[0]:
            name = "" if run.rate is None else f"{run.method.name}_{run.method.rates.index(run.rate)}"
            results.add(run, document(run, validation.get(name, "100000")))
    return results


def test_the_rate_is_chosen_by_validation_not_by_test(tmp_path):
    own = small()
    results = filled(tmp_path, own, mixlora_1="111000")
    for run in runs_of(own):  # the other rate is better on test
        if run.rate == PLAIN[0] and run.seed == 3:
            results.add(run, document(run, "100000", "111111111"))
    assert chosen_rate("one", own.method("mixlora"), results) == PLAIN[1]
    assert chosen_rate("one", own.method("graphmoe"), results) == Rate(0.01, 0.1), "of equal ones the first"
    later = [run_of(slot, results) for slot in slots(own) if slot.seed == 4]
    assert [run.rate for run in later] == [PLAIN[1], Rate(0.01, 0.1)]


def test_a_rate_that_was_not_run_or_diverged_chooses_nothing(tmp_path):
    own = small()
    results = filled(tmp_path, own)
    method = own.method("mixlora")
    for rate in PLAIN[:1]:
        run = Run(own, "one", method, rate, 3)
        results.add(run, document(run, diverged="the loss is nan", right={}))
    assert chosen_rate("one", method, results) == PLAIN[1]
    run = Run(own, "one", method, PLAIN[1], 3)
    results.add(run, document(run, diverged="the loss is nan", right={}))
    assert chosen_rate("one", method, results) == Undecided("every rate diverged with seed 3")
    assert "lr0.01" in chosen_rate("one", method, Results(own, tmp_path / "none")).reason


def test_several_seeds_choose_by_their_mean(tmp_path):
    """The first seed alone would choose another rate; what one of them lacks, or diverged with, is not chosen."""
    own = small(seeds=(3, 4, 5), rate_seeds=2)
    method = own.method("mixlora")
    marks = {(PLAIN[0], 3): "111000", (PLAIN[0], 4): "000000", (PLAIN[1], 3): "110000", (PLAIN[1], 4): "110000"}
    results = Results(own, tmp_path)
    for (rate, seed), validation in marks.items():
        assert isinstance(chosen_rate("one", method, results), Undecided)
        run = Run(own, "one", method, rate, seed)
        results.add(run, document(run, validation))
    assert chosen_rate("one", method, results) == PLAIN[1]
    assert [(slot.seed, slot.rate) for slot in slots(own) if slot.method == method] == [
        *((seed, rate) for seed in (3, 4) for rate in PLAIN),
        (5, None),
    ]
    run = Run(own, "one", method, PLAIN[1], 4)
    results.add(run, document(run, diverged="the loss is nan", right={}))
    assert chosen_rate("one", method, results) == PLAIN[0]


@pytest.mark.parametrize("count", [0, 3])
def test_rates_are_chosen_by_some_of_the_seeds(count):
    with pytest.raises(ValueError, match=rf"chooses rates with 1 to 2 seeds, got {count}"):
        part(rate_seeds=count)


def test_an_estimate_is_of_the_runs_own_method_and_task(tmp_path):
    own = part()
    results = Results(own, tmp_path)
    slow = Run(own, "three", own.method("graphmoe"), own.method("graphmoe").rates[0], 3)
    results.add(slow, document(slow, seconds={"per_step": 100.0, "asking": 20.0, "whole": 430.0}))
    times = {(slot.task, slot.method.name, slot.seed): seconds_of(slot, results) for slot in slots(own)}
    assert times["three", "graphmoe", 4] == 430
    assert times["one", "graphmoe", 4] == 7 + (4 + 1) * 2
    assert times["three", "mixlora", 3] == 7 + (4 + 2) * 1


def test_a_grid_of_another_size_is_refused():
    methods = part().methods
    uneven = dataclasses.replace(methods[1], rates=PLAIN[:1])
    with pytest.raises(ValueError, match=r"grid of the same size.*'mixlora': 1, 'graphmoe': 2"):
        part(methods=(uneven, methods[2]))
