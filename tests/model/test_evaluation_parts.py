"""Examples before a question, votes, and adapters' base models."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from graphmoe_model.base_models import check_base
from graphmoe_model.evaluation import EvaluationTask, SelfConsistency, evaluate_questions
from graphmoe_model.evaluation.adapters import attach_adapter, saved_config
from graphmoe_model.evaluation.document import conditions_of
from graphmoe_model.evaluation.prompts import Shots, cloze_after
from graphmoe_model.evaluation.records import standard_error
from graphmoe_model.evaluation.voting import majority
from graphmoe_model.questions import Question, QuestionEncoder
from tests.model.questions_made import byte_level, label_logits, made_questions, small_llama
from tests.model.tiny_models import tiny_model


def test_examples_depend_on_seed_and_question_alone():
    pool, questions = made_questions(30, seed=3), made_questions(10)
    choose = Shots("made", pool, 4, seed=0)
    all_of_them = [choose.of(question) for question in questions]
    assert [Shots("made", pool, 4, seed=0).of(question) for question in reversed(questions)][::-1] == all_of_them
    assert [Shots("made", pool, 4, seed=1).of(question) for question in questions] != all_of_them
    assert len({tuple(shots) for shots in all_of_them}) > 1
    assert all(len(set(shots)) == 4 for shots in all_of_them)


def test_a_question_is_no_example_of_itself():
    """Nor is the same question with another answer, and one that occurs twice counts once."""
    pool = made_questions(5)
    other = Question(pool[0].question, pool[0].choices, 1 - pool[0].answer % 2, pool[0].context)
    choose = Shots("made", [*pool, other, *pool], 4, seed=0)
    for _ in range(3):
        assert set(choose.of(pool[0])) == set(pool[1:])


def test_more_examples_than_there_are():
    pool = made_questions(5)
    with pytest.raises(ValueError, match=r"6 examples \(shots\).*of made, and its training split has 5; ask"):
        Shots("made", pool, 6, seed=0).of(made_questions(1, seed=9)[0])
    with pytest.raises(ValueError, match=r"5 examples.*and few.jsonl has 4 besides the question itself"):
        Shots("made", pool, 5, seed=0, source="few.jsonl").of(pool[0])


def test_solved_texts_stand_before_a_cloze_prompt():
    shot = Question("Which?", ("a cat", " a saw "), 1, context="Red.")
    question = Question("What?", ("x", "y"), 0)
    assert cloze_after([shot], question) == "Red.\nQuestion: Which?\nAnswer: a saw\n\nQuestion: What?\nAnswer:"


def test_examples_are_in_the_scored_prompt():
    tokenizer = byte_level()
    model, questions, pool = small_llama(tokenizer), made_questions(12), made_questions(20, seed=3)
    (result,) = evaluate_questions(model, tokenizer, [EvaluationTask("made", questions, pool)], shots=2, seed=5)
    assert result.truncated_prompts == 0
    for question, record in zip(questions, result.records, strict=True):
        shots = "".join(f"{shot.solved}\n\n" for shot in Shots("made", pool, 2, 5).of(question))
        logits = label_logits(model, tokenizer, shots + question.prompt, question.answers)
        assert record.first_token == int(logits.argmax())


def test_an_answer_that_begins_inside_the_cues_last_token_is_refused():
    """Its log-likelihood would be that of a part of it."""
    pieces = [("<unk>", 0.0), *((character, -9.0) for character in "Answer: cat"), (": c", -1.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)))
    encoder = QuestionEncoder(tokenizer)
    assert encoder.answer_ids("at") == tokenizer(" at")["input_ids"]
    with pytest.raises(ValueError, match="the answer 'cat' has no tokens of its own after 'Answer:'"):
        encoder.answer_ids("cat")


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused():
    tokenizer = byte_level()
    question = Question("which?", ("cat", "stone " * 80), 0)
    with pytest.raises(ValueError, match=r"an answer has 8\d tokens, and a prompt with it may have 64"):
        evaluate_questions(small_llama(tokenizer, positions=64), tokenizer, [EvaluationTask("made", [question])])


def test_votes_follow_the_temperature():
    logprobs = [math.log(0.6), math.log(0.3), math.log(0.1)]
    drawn = Counter(SelfConsistency(20_000, temperature=1.0).draw(logprobs, "key"))
    assert [drawn[i] / 20_000 for i in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.02)
    cold = SelfConsistency(500, temperature=0.05).draw(logprobs, "key")
    assert set(cold) == {0}
    assert SelfConsistency(9, seed=1).draw(logprobs, "key") == SelfConsistency(9, seed=1).draw(logprobs, "key")
    assert SelfConsistency(9, seed=1).draw(logprobs, "key") != SelfConsistency(9, seed=2).draw(logprobs, "key")
    assert SelfConsistency(9, seed=1).draw(logprobs, "key") != SelfConsistency(9, seed=1).draw(logprobs, "other")
    assert SelfConsistency(3, temperature=1e-300).draw([-1.0, -2.0], "key") == [0, 0, 0]  # no overflow


def test_majority_is_the_first_seen_of_equal_ones():
    assert majority([2, 0, 0, 2, 1]) == 2
    assert majority([0, 2, 2, 0, 1]) == 0
    assert majority([1, 2, 2]) == 2


def test_self_consistency_is_in_the_result():
    tokenizer, questions = byte_level(), made_questions(40)
    model = small_llama(tokenizer)
    sampling = SelfConsistency(5, temperature=5.0, seed=2)
    tasks = [EvaluationTask("made", questions)]
    (result,) = evaluate_questions(model, tokenizer, tasks, self_consistency=sampling)
    assert all(sum(record.votes) == 5 for record in result.records)
    assert all(record.votes[record.voted] == max(record.votes) for record in result.records)
    right = sum(record.voted == record.answer for record in result.records)
    assert result.self_consistency_accuracy == right / 40
    assert any(record.voted != record.first_token for record in result.records)
    (part,) = evaluate_questions(
        model, tokenizer, [EvaluationTask("part", questions[30:])], self_consistency=sampling, batch_size=3
    )
    assert [record.votes for record in part.records] == [record.votes for record in result.records[30:]]


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"samples": 2, "temperature": 0.0}, "temperature must be above 0"),
        ({"samples": 2, "temperature": math.nan}, "temperature must be above 0"),
        ({"samples": 2, "temperature": math.inf}, "temperature must be above 0"),
    ],
)
def test_wrong_sampling_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        SelfConsistency(**settings)


def test_tasks_without_questions_or_of_one_name_are_refused():
    tokenizer = byte_level()
    model = small_llama(tokenizer)
    with pytest.raises(ValueError, match="made has no questions"):
        EvaluationTask("made", [])
    task = EvaluationTask("made", made_questions(2))
    for tasks in ([], [task, task]):
        with pytest.raises(ValueError, match="at least one, each with a name of its own"):
            evaluate_questions(model, tokenizer, tasks)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    """Else an index outside the embedding: a crash on a CPU, a poisoned context on a GPU."""
    with pytest.raises(ValueError, match=r"token \d+ and the model knows 64"):
        evaluate_questions(tiny_model(), byte_level(), [EvaluationTask("made", made_questions(2))])


# --- Adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_another_base_is_refused_with_both_named(lora, tmp_path):
    config = saved_config(str(lora))
    check_base(config, str(lora), "org/base")
    with pytest.raises(ValueError, match=r"'org/base', and --model is 'org/other'.*--allow-other-base"):
        check_base(config, str(lora), "org/other")
    config.base_model_name_or_path = str(tmp_path)
    check_base(config, str(lora), f"{tmp_path}/./")  # the same folder
    (lora.parent / "beside").mkdir()
    config.base_model_name_or_path = "beside"  # as it was called where the adapter was trained
    check_base(config, str(lora), str(lora.parent / "beside"))
    with pytest.raises(ValueError, match="'beside', and --model is"):
        check_base(config, str(lora), str(tmp_path))
    config.base_model_name_or_path = None
    check_base(config, str(lora), "org/other")


def test_an_adapter_that_lacks_weights_is_refused(lora):
    """PEFT warns, and would evaluate the untrained ones."""
    settings = json.loads((lora / "adapter_config.json").read_text())
    settings["target_modules"] = ["q_proj", "v_proj"]
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"cannot attach the adapter .*missing adapter keys"):
        attach_adapter(tiny_model(), str(lora), saved_config(str(lora)))


def test_an_adapter_of_other_sizes_is_refused_in_one_line(lora):
    with pytest.raises(ValueError, match=r"does not fit the model: .*size mismatch") as refusal:
        attach_adapter(tiny_model(hidden_size=64), str(lora), saved_config(str(lora)))
    assert "\n" not in str(refusal.value)


def test_an_adapter_of_another_kind_of_model_is_refused(lora):
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "SEQ_CLS"}))
    with pytest.raises(ValueError, match="is an adapter for SEQ_CLS"):
        attach_adapter(tiny_model(), str(lora), saved_config(str(lora)))


# --- What is said of a result -----------------------------------------------------------------------------------------


def test_standard_error_of_one_answer_is_unknown():
    assert standard_error([True]) is None
    assert standard_error([True, False, True, False]) == pytest.approx((1 / 3) ** 0.5 / 2)


def test_the_dtype_of_a_result_is_the_base_s_not_that_of_the_adapter_s_many_tensors():
    model = nn.ModuleList([nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), *(nn.Linear(2, 2) for _ in range(9))])
    model.config = SimpleNamespace()
    assert conditions_of(model, torch.device("cpu"))["dtype"] == "bfloat16"
