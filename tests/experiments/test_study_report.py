"""The study's report: its arithmetic, what it says is missing, and docs/study.md as the committed results have it."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from experiments.study import __main__ as command
from experiments.study.parts import PARTS
from experiments.study.plan import accuracy
from experiments.study.report import PAGE, section, write_into
from experiments.study.results import RESULTS, Results, StudyError, runs_of
from experiments.study.statistics import over_questions
from graphmoe_model.analysis.one_run import load_variation
from graphmoe_model.analysis.statistics import T_QUANTILES, over_seeds
from tests.experiments.made_up import document, part


def filled(folder, seeds=(3, 4), skip=(), **tests: str) -> Results:
    """Results of every run but those skipped; test marks by ``method_seed``."""
    own = part(tasks=("one",), seeds=seeds)
    results = Results(own, folder)
    for run in runs_of(own):
        if (run.method.name, run.seed) not in skip:
            results.add(run, document(run, test=tests.get(f"{run.method.name}_{run.seed}", "101010101")))
    return results


def row(text: str, title: str, table: int = 0) -> list[str]:
    """The cells of the row of that title, of the table of that number among those that have one."""
    rows = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in rows[table].strip("|").split("|")]


def test_the_interval_over_seeds_is_students():
    values = [0.5, 0.6, 0.55, 0.72]
    found = over_seeds(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half == pytest.approx(3.182 * np.std(values, ddof=1) / np.sqrt(4))
    assert over_seeds([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="1 to 10 of them, got 0"):
        over_seeds([])


@pytest.mark.parametrize("freedom", range(1, 10))
def test_the_quantiles_are_students(freedom):
    """47.5% of the mass lies between 0 and each, by the density summed up."""
    constant = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    x = np.linspace(0, T_QUANTILES[freedom - 1], 20_001)
    density = constant * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.475, abs=2e-5)


def test_the_interval_over_questions_is_of_the_same_questions_on_both_sides():
    """Its width is that of the paired differences' mean; and where both answer alike it has none."""
    rng = np.random.default_rng(1)
    one = ["".join(rng.choice(["0", "1"], 400)) for _ in range(3)]
    other = [marks[:300] + "".join(rng.choice(["0", "1"], 100)) for marks in one]
    low, high = over_questions(one, other)
    marks = np.array([[int(a) - int(b) for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)])
    own = marks.mean(axis=0)
    error = own.std() / np.sqrt(len(own))
    assert (low + high) / 2 == pytest.approx(own.mean(), abs=0.2 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert over_questions(one, one) == (0, 0)
    with pytest.raises(ValueError, match=r"got \[2, 3\]"):
        over_questions(["10", "101"], ["10", "101"])


def test_accuracy_is_over_all_questions_not_over_groups():
    assert accuracy({"few": "1", "many": "0001"}) == 2 / 5


def test_the_load_is_of_the_last_logged_steps(tmp_path):
    file = tmp_path / "load.jsonl"
    one, other = [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]
    lines = ['{"step": 1, "load": {"a": [[1, 0, 0, 0], [1, 0, 0, 0]], "b": [[1, 0, 0, 0], [1, 0, 0, 0]]}}']
    lines += [f'{{"step": {i}, "load": {{"a": {[one, other]}, "b": {[other, other]}}}}}' for i in range(2, 7)]
    file.write_text("\n".join(lines) + "\n")
    expected = np.std(one) / np.mean(one) / 2
    assert load_variation(file) == [pytest.approx(expected, abs=1e-4), 0]
    assert load_variation(tmp_path / "none") is None


def test_the_tables_are_the_results(tmp_path):
    tests = {"mixlora_3": "111000000", "mixlora_4": "111111000", "graphmoe_3": "111111000", "graphmoe_4": "111111111"}
    text = section(filled(tmp_path, **tests))
    reached, half = [3 / 9, 6 / 9], 12.706 * np.std([3 / 9, 6 / 9], ddof=1) / np.sqrt(2)
    assert row(text, "MixLoRA")[:4] == ["MixLoRA", "0.01", "2", f"{100 * np.mean(reached):.1f} ± {100 * half:.1f}"]
    assert row(text, "MixLoRA")[4] == "100.0 ± 0.0", "of the group first"
    # seed by seed 3/9 more, though the seeds themselves differ by as much: paired, there is no spread
    difference = row(text, "GraphMoE", 1)
    assert difference[:3] == ["GraphMoE", "2", "+33.3 ± 0.0"]
    assert difference[4:] == ["+0.0 ± 0.0", "+50.0 ± 0.0"], "in each group of questions"
    assert row(text, "the base model", 1)[1] == "2", "one result beside both seeds"
    assert row(text, "GraphMoE", 2) == ["GraphMoE", "0.50 / 0.50", "8", "1,234"]
    assert "0.01: 33.3; 0.02: 33.3" in text


def test_what_is_missing_is_said_and_what_is_complete_is_not(tmp_path):
    text = " ".join(section(filled(tmp_path, skip={("graphmoe", 4)})).split())
    assert (
        "**one**: 2 of 3 methods have all of their runs with 2 seeds. Missing, seeds done: GraphMoE (1 of 2)." in text
    )
    assert "Of 7 runs 6 are done" in text
    assert "Missing" not in section(filled(tmp_path))


def test_every_condition_under_which_a_run_ran_is_told(tmp_path):
    """Seconds of two devices, or results of two commits, side by side are seen to be so."""
    results = filled(tmp_path)
    run = runs_of(results.part)[-1]
    other = {"device": "cuda (b)", "threads": 2, "dtype": "bfloat16", "commit": "def", "versions": {"torch": "3.0"}}
    results.add(run, document(run, conditions=other))
    text = " ".join(section(results).split())
    for told in ("device cpu (made up), cuda (b)", "threads 1, 2", "commit abc, def", "torch 2.0, 3.0"):
        assert told in text


def test_of_no_results_nothing_is_shown(tmp_path):
    text = section(Results(part(tasks=("one",)), tmp_path))
    assert "Of 7 runs 0 are done" in text
    assert "the base model (0 of 1);" in text
    assert "|" not in text


def test_a_method_without_a_chosen_rate_is_missing_and_in_no_difference(tmp_path):
    text = section(filled(tmp_path, skip={("graphmoe", 3), ("graphmoe", 4)}))
    assert "GraphMoE (0 of 2, its rate is not chosen)" in " ".join(text.split())
    assert row(text, "GraphMoE")[1:3] == ["–", "0"]
    assert len([line for line in text.splitlines() if line.startswith("| GraphMoE |")]) == 1


def test_runs_that_diverged_are_counted_and_in_no_mean(tmp_path):
    results = filled(tmp_path, mixlora_3="111111111")
    own = results.part
    for run in runs_of(own):
        if (run.method.name, run.seed) == ("mixlora", 4):
            results.add(run, document(run, diverged="the loss is nan", right={}))
    cells = row(section(results), "MixLoRA")
    assert cells[2:4] == ["1 (1 diverged)", "100.0"]


def test_a_page_without_marks_is_refused_and_keeps_the_rest(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study: a -->\nold\n<!-- /study: a -->\nafter\n")
    write_into(page, {"a": "new \\1"})
    assert page.read_text() == "before\n<!-- study: a -->\n\nnew \\1\n<!-- /study: a -->\nafter\n"
    with pytest.raises(StudyError, match="must have the marks <!-- study: b -->"):
        write_into(page, {"b": "new"})
    with pytest.raises(StudyError, match="cannot be read"):
        write_into(tmp_path / "none.md", {"a": "new"})


@pytest.mark.parametrize("name", PARTS)
def test_the_page_has_the_tables_of_the_committed_results(name):
    """`make study ARGS=report` was run after the last result."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"<!-- study: {name} -->\n\n(.*?)\n<!-- /study: {name} -->", text, re.DOTALL)
    assert found is not None
    assert found[1] == section(Results(PARTS[name], RESULTS / name))


@pytest.mark.parametrize("name", PARTS)
def test_the_page_describes_every_method_and_every_rate(name):
    text = PAGE.read_text(encoding="utf-8")
    for method in PARTS[name].methods:
        assert f"`{method.name}`" in text
    for rate in {rate.learning_rate for method in PARTS[name].methods for rate in method.rates}:
        assert re.search(rf"\b{rate:g}\b", text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "mixlora"], "add --part"),
        (["--budget", "2"], "as 2h, 30m or 90s, got '2'"),
        (["--budget", "0h"], "above 0"),
        (["report", "--dry-run"], "leave out --only, --budget and --dry-run"),
        (["--part", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_names_end_with_one_line(tmp_path, capsys):
    folders = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    assert command.main(["--part", "depth", "--only", "lora", *folders]) == 2
    assert "experiments.study: --only lora: the part depth has no such task" in capsys.readouterr().err


def test_a_dry_run_of_all_parts_needs_neither_model_nor_data(tmp_path, capsys):
    folders = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    assert command.main(["--dry-run", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "runs missing" in line] == ["real", "hard", "depth"]
    assert not list(tmp_path.iterdir())
