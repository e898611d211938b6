"""Evaluations as JSON, and runs side by side."""

from __future__ import annotations

import json
import random
import statistics

import pytest

from graphmoe_model.evaluation.comparison import comparison_page, method_record
from graphmoe_model.evaluation.document import averages, evaluation_document
from graphmoe_model.evaluation.paired import paired_difference
from graphmoe_model.evaluation.records import QuestionRecord, TaskResult


def answered(right: bool) -> QuestionRecord:
    return QuestionRecord(0, None, "?", ["A", "B"], 0, int(not right), [-0.1, -0.2], 0, 0, [-1.0, -2.0])


def scored(task: str, accuracy: float, stderr: float | None = 0.03) -> TaskResult:
    """The first of 100 questions are right."""
    records = [answered(number < 100 * accuracy) for number in range(100)]
    return TaskResult(task, 100, accuracy, stderr, 0.4, 0.5, None, 0, 1.0, "5e1f", records)


def test_average_counts_each_task_once():
    found = averages([scored("a", 0.5, 0.03), scored("b", 0.7, 0.04)])
    assert found == {"first_token_accuracy": pytest.approx(0.6), "acc": 0.4, "acc_norm": 0.5, "stderr": 0.025}
    assert averages([scored("a", 0.5, None), scored("b", 0.7)])["stderr"] is None


TRAINING = {
    "seconds": 120.0,
    "peak_memory": 2_500_000_000,
    "trainable_parameters": 1234,
    "adapter_bytes": 3_000_000,
    "last_loss": 0.25,
    "steps": 10,
    "conditions": {"seed": 3},
}


def evaluation(name: str, *results: TaskResult, training: dict | None = None) -> dict:
    conditions = {"name": name, "model": "base", "device": "cpu (x)", "parameters": 10, "versions": {"torch": "2"}}
    return evaluation_document(results, {}, conditions, training)


def test_a_record_has_the_sections_of_pefts_results():
    record = method_record(evaluation("run", scored("a", 0.5), training=TRAINING))
    assert set(record) == {"run_info", "train_info", "meta_info"}
    info = record["train_info"]
    assert (info["train_time"], info["accelerator_memory_max"]) == (120.0, 2_500_000_000)
    assert (info["num_trainable_params"], info["num_total_params"], info["file_size"]) == (1234, 10, 3_000_000)
    assert info["metrics"][0]["first_token_accuracy"] == 0.5
    assert "first_token_right" not in info["metrics"][0]  # a score of every question, not a metric
    assert record["run_info"]["seed"] == 3
    assert json.loads(json.dumps(record)) == record
    with pytest.raises(ValueError, match="is no evaluation: it has no tasks and no conditions"):
        method_record({"loss": 1})


def test_the_page_compares_what_all_have():
    base = evaluation("base", scored("a", 0.5), scored("b", 0.25))
    tuned = evaluation("tuned", scored("a", 0.75), scored("c", 0.1), training=TRAINING)
    page = comparison_page([base, tuned])
    assert "| base | 50.0 ± 3.0 |\n" in page
    assert "| tuned | 75.0 ± 3.0 |\n" in page
    assert "average" not in page  # of one task
    assert "| tuned | 120 | 2.50 | 1,234 | 3.0 | 0.25 |" in page
    assert "| base | – | – | – | – | – |" in page
    assert "left out: b, c." in page
    assert "less that of base on the same questions" in page
    assert "| tuned | +25.0 ± 4.4 (+25, -0) |\n" in page
    with pytest.raises(ValueError, match="at least two evaluations, got 1"):
        comparison_page([base])
    with pytest.raises(ValueError, match="no task in common: base has a, b; other has d"):
        comparison_page([base, evaluation("other", scored("d", 0.1))])


def test_a_difference_is_of_pairs():
    """Against the variance of each question's difference, counted one by one."""
    draw = random.Random(0)
    own, other = ("".join(draw.choices("01", k=250)) for _ in range(2))
    each = [int(mine) - int(theirs) for mine, theirs in zip(own, other, strict=True)]
    found = paired_difference(own, other)
    assert found.mean == pytest.approx(statistics.mean(each))
    assert found.stderr == pytest.approx(statistics.stdev(each) / 250**0.5)
    assert (found.gained, found.lost) == (each.count(1), each.count(-1))
    assert paired_difference(own, own) == (0.0, 0.0, 0, 0)
    assert paired_difference("1", "0").stderr is None
    with pytest.raises(ValueError, match="got 1 and 2 of them"):
        paired_difference("1", "01")


def test_the_average_s_difference_counts_each_task_once():
    base = evaluation("base", scored("a", 0.5), scored("b", 0.2))
    tuned = evaluation("tuned", scored("a", 0.75), scored("b", 0.1))
    assert "| base | 50.0 ± 3.0 | 20.0 ± 3.0 | 35.0 |" in comparison_page([base, tuned])
    assert "| tuned | +25.0 ± 4.4 (+25, -0) | -10.0 ± 3.0 (+0, -10) | +7.5 ± 2.6 |" in comparison_page([base, tuned])


@pytest.mark.parametrize("part", ["first_token_right", "questions_sha256", "acc"])
def test_a_run_that_lacks_what_is_compared_is_refused(part):
    base, tuned = evaluation("base", scored("a", 0.5)), evaluation("tuned", scored("a", 0.75))
    del tuned["tasks"]["a"][part]
    with pytest.raises(ValueError, match=f"the document has no {part} of a: it was written by an earlier version"):
        comparison_page([base, tuned])


def test_unlike_evaluations_are_not_compared_as_like_ones():
    """Other questions under one name are refused; what else gives an accuracy another meaning is said."""
    base, tuned = evaluation("base", scored("a", 0.5)), evaluation("tuned", scored("a", 0.75))
    assert "Not evaluated alike" not in comparison_page([base, tuned])
    tuned["tasks"]["a"]["questions_sha256"] = "0ther"
    with pytest.raises(ValueError, match=r"base and tuned answered other questions as a: questions with .* 5e1f and "):
        comparison_page([base, tuned])
    tuned["tasks"]["a"]["questions"] = 99
    with pytest.raises(ValueError, match=r"base and tuned .* as a: 100 questions and 99 questions; .* same --limit"):
        comparison_page([base, tuned])
    tuned["tasks"]["a"] = base["tasks"]["a"]
    base["conditions"] |= {"shots": 5, "seed": 1}
    page = comparison_page([base, tuned])
    assert "Not evaluated alike" in page
    assert "- shots: 5 in base, none in tuned" in page
    assert "- seed: 1 in base, none in tuned" in page
