"""lm-eval's own tasks run on adapters as they run on models; here one task of its form, on a local file."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from lm_eval.tasks import TaskManager
from peft import get_peft_model

from graphmoe_model.evaluation import standard
from graphmoe_model.evaluation.standard import evaluate_standard
from tests.model.questions_made import byte_level, made_questions, small_llama, text_logprob
from tests.model.tiny_models import tiny_config

TASK = """
task: made
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """lm-eval with the task ``made`` alone (indexing its own thousands takes it half a minute)."""
    rows = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in made_questions(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = partial(TaskManager, include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr(standard, "TaskManager", manager)


def test_an_adapter_is_what_lm_eval_scores(tasks):
    tokenizer = byte_level()
    model = get_peft_model(small_llama(tokenizer), tiny_config(init_lora_weights=False, rounds=2)).eval()
    found = evaluate_standard(model, tokenizer, ["made"], limit=10, batch_size=4)
    right = []
    for question in made_questions(12)[:10]:
        prompt = f"Question: {question.question}\nAnswer:"
        logprobs = torch.tensor([text_logprob(model, tokenizer, prompt, choice) for choice in question.choices])
        right.append(int(logprobs.argmax()) == question.answer)
    assert found["made"]["acc"] == sum(right) / 10
    assert found["made"]["acc_stderr"] > 0
    assert found["made"]["questions"] == 10


def test_an_unknown_task_is_named_with_near_ones(tasks):
    tokenizer = byte_level()
    with pytest.raises(ValueError, match="lm-eval has no task 'maid'; near it are made"):
        evaluate_standard(small_llama(tokenizer), tokenizer, ["maid"])


def test_data_that_cannot_be_had_is_said(tasks, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    tokenizer = byte_level()
    with pytest.raises(ValueError, match=r"lm-eval cannot load the data of made: .*--data"):
        evaluate_standard(small_llama(tokenizer), tokenizer, ["made"])
