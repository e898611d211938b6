"""lm-eval's scores are what raw logits give, question by question."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase

from graphmoe_model.base_models import ModelSource, load_tokenizer
from graphmoe_model.evaluation import EvaluationTask, SelfConsistency, evaluate_questions, first_token_answers
from graphmoe_model.evaluation.language_model import InMemoryLM
from graphmoe_model.questions import Question, QuestionEncoder
from graphmoe_tables.tasks import data_folder
from tests.model.questions_made import (
    TOKENIZERS,
    byte_level,
    label_logits,
    made_questions,
    small_llama,
    text_logprob,
)
from tests.model.tiny_models import tiny_config


def check_first_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Of 200 questions, each by a forward of its prompt alone."""
    model, questions = small_llama(tokenizer), made_questions(200)
    (result,) = evaluate_questions(model, tokenizer, [EvaluationTask("made", questions)])
    right = []
    for question, record in zip(questions, result.records, strict=True):
        logits = label_logits(model, tokenizer, question.prompt, question.answers)
        assert record.first_token == int(logits.argmax())
        differences = torch.tensor(record.label_logprobs) - logits  # log-softmax: one constant for all
        assert float(differences.max() - differences.min()) < 1e-4
        right.append(int(logits.argmax()) == question.answer)
    assert result.first_token_accuracy == np.mean(right)
    assert result.stderr == pytest.approx(np.std(right, ddof=1) / 200**0.5)
    assert 0.15 < result.first_token_accuracy < 0.85  # a scorer that always says the same would not be told
    assert len({record.first_token for record in result.records}) > 3


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_first_token_is_that_of_raw_logits_question_by_question(kind):
    check_first_tokens(TOKENIZERS[kind]())


@pytest.mark.parametrize("positions", [512, 64])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_first_tokens_alone_are_those_of_both_scorings(kind, positions):
    """Of prompts that are cut, too."""
    tokenizer = TOKENIZERS[kind]()
    model, task = small_llama(tokenizer, positions), EvaluationTask("made", made_questions(100))
    (result,) = evaluate_questions(model, tokenizer, [task])
    assert (result.truncated_prompts > 0) == (positions == 64)
    assert first_token_answers(model, tokenizer, task) == [record.first_token for record in result.records]


def test_first_tokens_alone_do_not_read_the_choices_as_answers():
    """A choice that is too long to be scored as a text leaves its label as it is."""
    tokenizer = byte_level()
    model = small_llama(tokenizer, positions=64)
    question = Question("which?", ("cat", "stone " * 80), 0)
    task = EvaluationTask("made", [question])
    with pytest.raises(ValueError, match="an answer has 8"):
        evaluate_questions(model, tokenizer, [task])
    ids = QuestionEncoder(tokenizer, 64).prompt_ids(question)
    assert len(ids) == 63
    labels = [tokenizer(f"Answer: {label}")["input_ids"][-1] for label in question.answers]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1, labels]
    assert first_token_answers(model, tokenizer, task) == [int(logits.argmax())]


@pytest.mark.slow
def test_first_token_with_the_tokenizer_of_smollm2():
    """The real one, of 49,152 tokens, read from its GGUF file."""
    pytest.importorskip("gguf")
    files = sorted((data_folder() / "smollm2").glob("*.gguf"))
    if not files:
        pytest.skip(f"SmolLM2 is not in {data_folder()}: graphmoe data fetch smollm2")
    check_first_tokens(load_tokenizer(ModelSource(str(files[0].parent), gguf_file=files[0].name)))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_is_scored_by_its_log_likelihood(kind):
    """The cloze prompt has no letters; acc_norm divides by the choice's characters."""
    tokenizer = TOKENIZERS[kind]()
    model, questions = small_llama(tokenizer), made_questions(40)
    (result,) = evaluate_questions(model, tokenizer, [EvaluationTask("made", questions)], batch_size=5)
    best, best_norm = [], []
    for question, record in zip(questions, result.records, strict=True):
        context = f"{question.context}\n" if question.context else ""
        prompt = f"{context}Question: {question.question}\nAnswer:"
        found = np.array([text_logprob(model, tokenizer, prompt, choice) for choice in question.choices])
        assert record.text_logprobs == pytest.approx(found, abs=1e-3)
        best.append(int(found.argmax()) == question.answer)
        best_norm.append(int((found / [len(choice) for choice in question.choices]).argmax()) == question.answer)
        assert (record.text == record.answer, record.text_norm == record.answer) == (best[-1], best_norm[-1])
    assert (result.acc, result.acc_norm) == (np.mean(best), np.mean(best_norm))
    assert best != best_norm


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_lm_eval_by_itself_would_read_the_same_tokens(kind):
    """So whoever runs these prompts by lm-eval alone gets the same scores, as long as no prompt is too long."""
    tokenizer = TOKENIZERS[kind]()
    lm, encoder = InMemoryLM(small_llama(tokenizer), tokenizer, batch_size=1), QuestionEncoder(tokenizer, 512)
    for question in made_questions(100):
        ids, tokens = encoder.prompt_ids(question), encoder.label_tokens(question)
        found = [lm._encode_pair(question.prompt, f" {label}") for label in question.answers]
        assert found == [(ids, [token]) for token in tokens]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_adapters_are_evaluated_as_they_are(batch_size):
    """Ours and PEFT's own: the adapter's logits count, not the base model's."""
    tokenizer, questions = byte_level(), made_questions(30)
    for config in (
        tiny_config(init_lora_weights=False, rounds=2),
        LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    ):
        base = small_llama(tokenizer)
        (without,) = evaluate_questions(base, tokenizer, [EvaluationTask("made", questions)])
        adapted = get_peft_model(base, config)
        (found,) = evaluate_questions(adapted, tokenizer, [EvaluationTask("made", questions)], batch_size=batch_size)
        assert [r.label_logprobs for r in found.records] != [r.label_logprobs for r in without.records]
        for question, record in zip(questions, found.records, strict=True):
            logits = label_logits(adapted, tokenizer, question.prompt, question.answers)
            assert torch.tensor(record.label_logprobs).argmax() == logits.argmax()


def test_bfloat16_labels_are_told_apart():
    """A log-softmax in bf16 rounds log-probabilities of -6 to steps of 0.03, which logits near 0 do not have."""
    tokenizer, questions = byte_level(), made_questions(60)
    model = small_llama(tokenizer).bfloat16()
    (result,) = evaluate_questions(model, tokenizer, [EvaluationTask("made", questions)], batch_size=1)
    for question, record in zip(questions, result.records, strict=True):
        logits = label_logits(model, tokenizer, question.prompt, question.answers).float()
        differences = torch.tensor(record.label_logprobs) - logits
        assert float(differences.max() - differences.min()) < 1e-4


def test_a_long_prompt_keeps_its_start_token_and_its_end():
    """By itself lm-eval drops the beginning-of-sequence token of a prompt that is too long."""
    tokenizer = byte_level()
    model = small_llama(tokenizer, positions=64)
    questions = [Question("which?", ("cat", "red metal dog"), 1, context="river stone " * 60), *made_questions(5)]
    (result,) = evaluate_questions(model, tokenizer, [EvaluationTask("made", questions)])
    ids = tokenizer(questions[0].prompt)["input_ids"]
    assert len(ids) > 100
    kept = [tokenizer.bos_token_id, *ids[-62:]]  # 64 with the label
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([kept])).logits[0, -1]
    labels = [tokenizer(f"Answer: {label}")["input_ids"][-1] for label in "AB"]
    found = torch.tensor(result.records[0].label_logprobs)
    assert float((found - found[0] - (logits[labels] - logits[labels[0]])).abs().max()) < 1e-4
    assert result.truncated_prompts >= 2


def test_all_choices_follow_the_same_tokens_of_a_long_prompt():
    tokenizer = byte_level()
    model = small_llama(tokenizer, positions=64)
    question = Question("which?", ("cat", "red metal dog falls near glass"), 1, context="river stone " * 60)
    (result,) = evaluate_questions(model, tokenizer, [EvaluationTask("made", [question])])
    prompt = tokenizer(f"{question.context.strip()}\nQuestion: which?\nAnswer:")["input_ids"]
    answers = [tokenizer(f"Answer: {c}")["input_ids"][3:] for c in question.choices]
    assert tokenizer.decode(answers[1]) == " red metal dog falls near glass"
    kept = [prompt[0], *prompt[-(64 - 1 - len(answers[1])) :]]
    for answer, logprob in zip(answers, result.records[0].text_logprobs, strict=True):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([kept + answer])).logits[0].log_softmax(-1)
        wanted = sum(float(logprobs[len(kept) + i - 1, token]) for i, token in enumerate(answer))
        assert logprob == pytest.approx(wanted, abs=1e-3)


def test_several_tasks_come_back_in_their_order():
    tokenizer = byte_level()
    model = small_llama(tokenizer)
    tasks = [EvaluationTask(name, made_questions(12, seed)) for seed, name in enumerate(["b", "a"])]
    together = evaluate_questions(model, tokenizer, tasks)
    assert [result.task for result in together] == ["b", "a"]
    for task, result in zip(tasks, together, strict=True):
        (alone,) = evaluate_questions(model, tokenizer, [task])
        assert [r.first_token for r in alone.records] == [r.first_token for r in result.records]


def test_random_numbers_of_the_program_are_not_touched():
    tokenizer = byte_level()
    model = small_llama(tokenizer)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate_questions(
        model, tokenizer, [EvaluationTask("made", made_questions(3))], self_consistency=SelfConsistency(3)
    )
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_progress_ends_at_the_whole():
    tokenizer = byte_level()
    told: list[tuple[int, int]] = []
    questions = made_questions(20)
    evaluate_questions(
        small_llama(tokenizer), tokenizer, [EvaluationTask("made", questions)], progress=lambda *n: told.append(n)
    )
    assert told[-1][0] == told[-1][1] > 20
    assert told == sorted(told)


def test_a_tokenizer_without_special_tokens_will_do_and_stays_as_it_is():
    tokenizer = byte_level(special_first=False)
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token = tokenizer.unk_token = None
    size = len(tokenizer)
    (result,) = evaluate_questions(small_llama(tokenizer), tokenizer, [EvaluationTask("made", made_questions(5))])
    assert result.questions == 5
    assert (len(tokenizer), tokenizer.pad_token) == (size, None)
